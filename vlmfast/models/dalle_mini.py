"""DALL-E mini and mega (Dayma et al. 2021, github.com/borisdayma/dalle-mini).

A BART encoder reads the caption, a BART decoder writes the 256 codes of a VQGAN. Layers are NormFormer's
(Shleifer et al. 2021, arXiv:2110.09456) with gated feed-forward networks (Shazeer 2020, arXiv:2002.05202); no linear
layer has a bias. State-dict keys are those of min-dalle's files, under "encoder." and "decoder.".

Sizes: B batch, T text tokens, N image codes, C width, H heads.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..layers.cross_entropy import linear_cross_entropy
from ..layers.linear import Linear
from ..layers.transformer import LayerNorm
from ..ops.decoding import few_row_linear
from .config import ModelConfig, check_ids


@dataclass(frozen=True, kw_only=True)
class DALLEMiniConfig(ModelConfig):
    """Sizes under the names of dalle-mini's config.json; the defaults are DALL-E mini's."""

    d_model: int = 1024
    encoder_layers: int = 12
    encoder_attention_heads: int = 16
    encoder_ffn_dim: int = 2730
    decoder_layers: int = 12
    decoder_attention_heads: int = 16
    decoder_ffn_dim: int = 2730
    encoder_vocab_size: int = 50264
    max_text_length: int = 64
    image_vocab_size: int = 16384
    image_grid: int = 16  # codes along a side; image_length is its square
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    decoder_start_token_id: int = 16384
    num_image_codes: int = 16384  # of the VQGAN: what is drawn, though mega has more entries

    def __post_init__(self):
        self.check_numbers(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"))
        for side in ("encoder", "decoder"):
            self.check_heads("d_model", f"{side}_attention_heads")
        if self.decoder_start_token_id > self.image_vocab_size:
            self.refuse("decoder_start_token_id", f"at most image_vocab_size, {self.image_vocab_size}")
        if self.num_image_codes > self.image_vocab_size:
            self.refuse("num_image_codes", f"at most image_vocab_size, {self.image_vocab_size}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) >= self.encoder_vocab_size:
                self.refuse(name, f"less than encoder_vocab_size, {self.encoder_vocab_size}")

    @property
    def image_seq_len(self) -> int:
        return self.image_grid**2

    @property
    def text_seq_len(self) -> int:
        return self.max_text_length


class GLU(nn.Module):
    """fc2(ln1(gelu(fc0 x) * fc1 x)) with x = ln0(input)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.ln0, self.ln1 = LayerNorm(width), LayerNorm(hidden)
        self.fc0 = Linear(width, hidden, bias=False)
        self.fc1 = Linear(width, hidden, bias=False)
        self.fc2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln0(x)
        return self.fc2(self.ln1(F.gelu(self.fc0(x)) * self.fc1(x)))


class Attention(nn.Module):
    """Multi-head attention, its projections apart so that keys and values can be kept."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear(width, width, bias=False))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, C] -> key and value [B, S, H, D]."""
        return tuple(proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.k_proj, self.v_proj))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None,
                causal: bool = False) -> Tensor:
        """x [B, S, C]; `lengths` [B] keys of each sample count. -> [B, S, C]."""
        query = self.q_proj(x).unflatten(-1, (self.heads, -1))
        out = ops.cross_attention(query, key, value, lengths_k=lengths, causal=causal).out
        return self.out_proj(out.flatten(2))

    def step(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """One query: x [B, 1, C], key and value [B, S, H, D], mask [B, 1, 1, S] of what counts or None."""
        query = self.q_proj(x).unflatten(-1, (self.heads, -1))
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)), attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.pre_self_attn_layer_norm = LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = LayerNorm(width)
        self.glu = GLU(width, hidden)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.pre_self_attn_layer_norm(x)
        x = x + self.self_attn_layer_norm(self.self_attn(y, *self.self_attn.keys_values(y), lengths))
        return x + self.glu(x)


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.pre_self_attn_layer_norm = LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = LayerNorm(width)
        self.pre_encoder_attn_layer_norm = LayerNorm(width)
        self.encoder_attn = Attention(width, heads)
        self.encoder_attn_layer_norm = LayerNorm(width)
        self.glu = GLU(width, hidden)

    def forward(self, x: Tensor, context: tuple[Tensor, Tensor], lengths: Tensor,
                store: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, S, C]; `context` keys and values of the text; `store` takes those of x at its start."""
        y = self.pre_self_attn_layer_norm(x)
        key, value = self.self_attn.keys_values(y)
        if store is not None:
            store[0][:, : x.shape[1]], store[1][:, : x.shape[1]] = key, value
        x = x + self.self_attn_layer_norm(self.self_attn(y, key, value, causal=True))
        y = self.pre_encoder_attn_layer_norm(x)
        x = x + self.encoder_attn_layer_norm(self.encoder_attn(y, *context, lengths))
        return x + self.glu(x)

    def step(self, x: Tensor, position: int, context: tuple[Tensor, Tensor], mask: Tensor | None,
             store: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, 1, C] at `position`."""
        y = self.pre_self_attn_layer_norm(x)
        for kept, new in zip(store, self.self_attn.keys_values(y), strict=True):
            kept[:, position : position + 1] = new
        x = x + self.self_attn_layer_norm(self.self_attn.step(y, *(kept[:, : position + 1] for kept in store)))
        y = self.pre_encoder_attn_layer_norm(x)
        x = x + self.encoder_attn_layer_norm(self.encoder_attn.step(y, *context, mask))
        return x + self.glu(x)


class Encoder(nn.Module):
    """Text tokens [B, T] -> states [B, T, C]."""

    def __init__(self, config: DALLEMiniConfig):
        super().__init__()
        width = config.d_model
        self.embed_tokens = nn.Embedding(config.encoder_vocab_size, width)
        self.embed_positions = nn.Embedding(config.max_text_length, width)
        self.layernorm_embedding = LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, config.encoder_attention_heads, config.encoder_ffn_dim)
                                    for _ in range(config.encoder_layers))
        self.final_ln = LayerNorm(width)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.layernorm_embedding(self.embed_tokens(tokens) + self.embed_positions.weight[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x, lengths)
        return self.final_ln(x)


class Decoder(nn.Module):
    """Codes before, from the start token on -> states; `lm_head` scores the next code."""

    def __init__(self, config: DALLEMiniConfig):
        super().__init__()
        width = config.d_model
        self.embed_tokens = nn.Embedding(config.image_vocab_size + 1, width)
        self.embed_positions = nn.Embedding(config.image_seq_len, width)
        self.layernorm_embedding = LayerNorm(width)
        self.layers = nn.ModuleList(DecoderLayer(width, config.decoder_attention_heads, config.decoder_ffn_dim)
                                    for _ in range(config.decoder_layers))
        self.final_ln = LayerNorm(width)
        self.lm_head = nn.Linear(width, config.image_vocab_size + 1, bias=False)

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        positions = self.embed_positions.weight[start : start + tokens.shape[1]]
        return self.layernorm_embedding(self.embed_tokens(tokens) + positions)


class DALLEMiniOutput(NamedTuple):
    logits: Tensor | None  # [B, codes given + 1 (at most N), image vocabulary + 1]
    loss: Tensor | None  # [] fp32


class DALLEMiniState:
    """What decoding keeps: for each layer keys and values of the text, computed once, and of the codes so far."""

    def __init__(self, contexts, mask: Tensor | None, stores, position: int):
        self.contexts, self.mask, self.stores, self.position = contexts, mask, stores, position


class DALLEMini(nn.Module):
    """Encoder and decoder.

    Args:
        config: sizes.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        tokenizer: set when a checkpoint is loaded with its vocabulary.
        vae: the VQGAN, or None; see `attach_vae`.
    """

    def __init__(self, config: DALLEMiniConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.tokenizer, self.vae = config, None, None
        with nullcontext() if device is None else torch.device(device):
            self.encoder, self.decoder = Encoder(config), Decoder(config)
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)

    def attach_vae(self, vae: nn.Module) -> None:
        """Sets `vae`; raises ValueError where its codes are not this model's."""
        if vae.vocab_size != self.config.num_image_codes:
            raise ValueError(f"DALLEMini: the VQGAN has {vae.vocab_size} codes, num_image_codes is "
                             f"{self.config.num_image_codes}")
        object.__setattr__(self, "vae", vae)  # not a submodule: neither trained nor saved with this model

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.lm_head.weight.dtype

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of a picture in codes."""
        return self.config.image_grid, self.config.image_grid

    def null_text(self, batch: int) -> Tensor:
        """[B, T] of an empty prompt: start, end and padding."""
        config = self.config
        text = torch.full((batch, config.max_text_length), config.pad_token_id)
        text[:, 0], text[:, 1] = config.bos_token_id, config.eos_token_id
        return text

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Text states.

        Args:
            tokens: [B, 1..T] integer ids; padding at the end is `pad_token_id`.

        Returns:
            (states [B, T, C], lengths [B]).

        Raises:
            TypeError: not integers. ValueError: longer than the text context, or an id outside the vocabulary.
        """
        config = self.config
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"DALLEMini: text is {tokens.dtype}, must be integers")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= config.max_text_length:
            raise ValueError(f"DALLEMini: text has shape {list(tokens.shape)}, must be [B, 1..{config.max_text_length}]"
                             ": the prompt is longer than the text context")
        check_ids("DALLEMini", "text", tokens, config.encoder_vocab_size)
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        lengths = ((tokens != config.pad_token_id) * places).amax(1)
        return self.encoder(tokens, lengths), lengths

    def forward(self, text: Tensor, image_codes: Tensor | None = None, return_loss: bool = False) -> DALLEMiniOutput:
        """Scores of the code after each of those given, or their mean cross-entropy.

        Args:
            text: [B, 1..T], padded with `pad_token_id`.
            image_codes: [B, 0..N] or [B, h, w] integer codes.
            return_loss: score all codes (there must be N).

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        codes = self._check_codes(image_codes, text)
        if return_loss and codes.shape[1] != self.config.image_seq_len:
            raise ValueError(f"DALLEMini: image_codes has {codes.shape[1]} codes an image, the loss needs all "
                             f"{self.config.image_seq_len}")
        states, lengths = self.encode_text(text)
        x = self.decoder.embed(self._shifted(codes), 0)
        for layer in self.decoder.layers:
            x = layer(x, layer.encoder_attn.keys_values(states), lengths)
        x = self.decoder.final_ln(x)
        if not return_loss:
            return DALLEMiniOutput(self.decoder.lm_head(x), None)
        return DALLEMiniOutput(None, linear_cross_entropy(x.flatten(0, 1), self.decoder.lm_head.weight, None,
                                                          codes.flatten()))

    def prefill(self, text: Tensor, image_codes: Tensor | None = None, copies: int = 1):
        """Reads a prompt, and the first codes of an image where given, and is ready to write on.

        Args:
            text: [B, 1..T]. image_codes: [B, 0..N-1].
            copies: images to draw of each prompt.

        Returns:
            (logits of the next code [B copies, num_image_codes], state for `step`).
        """
        config, codes = self.config, self._check_codes(image_codes, text)
        if codes.shape[1] >= config.image_seq_len:
            raise ValueError(f"DALLEMini: image_codes has {codes.shape[1]} codes, must be fewer than the image's "
                             f"{config.image_seq_len}")
        states, lengths = self.encode_text(text)
        longest = int(lengths.max())
        states, lengths = states[:, :longest], lengths.repeat_interleave(copies, 0)
        mask = None
        if int(lengths.min()) < longest:
            mask = (torch.arange(longest, device=text.device) < lengths[:, None])[:, None, None]
        x = self.decoder.embed(self._shifted(codes), 0).repeat_interleave(copies, 0)
        contexts, stores = [], []
        for layer in self.decoder.layers:
            contexts.append(tuple(part.repeat_interleave(copies, 0)
                                  for part in layer.encoder_attn.keys_values(states)))
            heads = layer.self_attn.heads
            shape = len(x), config.image_seq_len, heads, config.d_model // heads
            stores.append((x.new_zeros(shape), x.new_zeros(shape)))
            x = layer(x, contexts[-1], lengths, stores[-1])
        return self._logits(x[:, -1:]), DALLEMiniState(contexts, mask, stores, codes.shape[1] + 1)

    def step(self, codes: Tensor, state: DALLEMiniState) -> Tensor:
        """One code [B] further: logits of the next one [B, num_image_codes]. Equal to `forward`'s at that position.

        Raises:
            ValueError: the image is complete.
        """
        if state.position >= self.config.image_seq_len:
            raise ValueError(f"DALLEMini: the image already has {state.position} codes")
        x = self.decoder.embed(codes[:, None], state.position)
        for layer, context, store in zip(self.decoder.layers, state.contexts, state.stores, strict=True):
            x = layer.step(x, state.position, context, state.mask, store)
        state.position += 1
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.decoder.lm_head.weight[: self.config.num_image_codes]
        return few_row_linear(self.decoder.final_ln(x[:, 0]), weight)

    def _shifted(self, codes: Tensor) -> Tensor:
        """The start token, then all codes but a last one that completes the image."""
        codes = codes[:, : self.config.image_seq_len - 1]
        return F.pad(codes, (1, 0), value=self.config.decoder_start_token_id)

    def _check_codes(self, codes: Tensor | None, text: Tensor) -> Tensor:
        config = self.config
        if codes is None:
            return torch.zeros(len(text), 0, dtype=torch.int64, device=text.device)
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise TypeError(f"DALLEMini: image_codes are {codes.dtype}, must be integers")
        codes = codes.flatten(1) if codes.ndim == 3 else codes
        if codes.ndim != 2 or len(codes) != len(text) or codes.shape[1] > config.image_seq_len:
            raise ValueError(f"DALLEMini: image_codes has shape {list(codes.shape)}, must be [{len(text)}, "
                             f"0..{config.image_seq_len}]")
        check_ids("DALLEMini", "image_codes", codes, config.image_vocab_size)
        return codes


def _sizes(width: int, layers: int, heads: int, hidden: int, **more) -> dict:
    return dict(d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=hidden,
                decoder_layers=layers, decoder_attention_heads=heads, decoder_ffn_dim=hidden, **more)


PRESETS: dict[str, dict] = {
    "dalle-mini": {},
    "dalle-mega": _sizes(2048, 24, 32, 4096, encoder_vocab_size=50272, image_vocab_size=16415),
    "dalle-mini-tiny": _sizes(128, 3, 4, 256, encoder_vocab_size=1024, max_text_length=16, image_vocab_size=256,
                              image_grid=8, decoder_start_token_id=256, num_image_codes=256),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> DALLEMini:
    """A freshly initialised preset; `overrides` replace config fields."""
    return DALLEMini(DALLEMiniConfig.from_dict({**PRESETS[name], **overrides}), device=device)
