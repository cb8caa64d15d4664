"""DALL-E: Zero-Shot Text-to-Image Generation (Ramesh et al. 2021, arXiv:2102.12092), its second stage.

A decoder-only transformer that reads a text and then writes the codes of an image, row by row, which a discrete VAE
turns into pixels. Attention is sparse (Fig. 11); each text position has a padding token of its own; a position is only
scored over the tokens it can emit, text or image. Variants of the open implementations (DALLE-pytorch, ru-dalle) are
fields of the config.

Sizes: B batch, T text tokens, P = T (+ 1 with a start token), N = height width image codes, L = P + N, C width.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.axial import AXIAL_KINDS, AxialCache, rotary_angles
from ..layers.axial_block import AxialBlock, BlockCache
from ..layers.cross_entropy import linear_cross_entropy
from ..layers.token_shift import ShiftCache
from ..layers.transformer import LayerNorm
from ..ops.decoding import few_row_linear
from .config import ModelConfig, check_ids

FEED_FORWARDS = "gelu", "geglu"
# orders of attention kinds; the last layer of the first two differs (paper, app. B.1; ru-dalle)
ORDERS = {
    "paper": (("row", "col", "row", "row"), "conv"),
    "ru-dalle-v2": (("row", "col", "row", "row"), "conv_wrap"),
    "dalle-pytorch": (("full", "row_only", "col", "corner"), None),
}


@dataclass(frozen=True, kw_only=True)
class DALLEConfig(ModelConfig):
    """Sizes under DALLE-pytorch's names; without arguments the 12-billion-parameter model of the paper."""

    dim: int = 3968
    depth: int = 64
    heads: int = 62
    dim_head: int = 64
    ff_mult: int = 4
    num_text_tokens: int = 16384  # of the vocabulary, without the padding tokens
    text_seq_len: int = 256
    num_image_tokens: int = 8192
    image_grid: tuple[int, int] = (32, 32)  # height and width in codes
    attn_types: str | tuple[str, ...] = "paper"  # one of ORDERS, or kinds repeated down the layers
    conv_kernel: int = 11  # side of the square of "conv", "conv_wrap" and "corner"
    start_token: bool = False  # token 0 before the text (DALLE-pytorch)
    qkv_bias: bool = True
    feed_forward: str = "gelu"
    rotary: bool = False  # angles on queries, keys and values instead of learned positions
    shift_tokens: bool = False  # part of the channels come from the neighbours before
    sandwich_norm: bool = False
    layer_scale: bool = False
    divide_max: bool = False  # of the last states by their largest (DALLE-pytorch's `stable`)
    shared_embeddings: bool = False  # rows of the output matrix embed the tokens
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    image_loss_weight: float = 7.0  # against 1 for the text
    token_offset: int = 0  # added to a tokenizer's ids: 1 keeps its token 0 apart from padding

    def __post_init__(self):
        for name in ("image_grid", "attn_types"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        self.check_numbers(("token_offset",))
        self.check_choice("feed_forward", FEED_FORWARDS)
        grid = self.image_grid
        if not isinstance(grid, tuple) or len(grid) != 2 or not all(type(n) is int and n > 0 for n in grid):
            self.refuse("image_grid", "two positive integers")
        if isinstance(self.attn_types, str):
            self.check_choice("attn_types", ORDERS)
        elif not self.attn_types or not set(self.attn_types) <= set(AXIAL_KINDS):
            self.refuse("attn_types", f"one of {list(ORDERS)} or some of {list(AXIAL_KINDS)}")
        if self.conv_kernel % 2 == 0:
            self.refuse("conv_kernel", "odd")
        if self.shift_tokens and self.dim % 4:
            self.refuse("dim", "a multiple of 4 with shift_tokens")
        if self.rotary and self.dim_head < 6:
            self.refuse("dim_head", "at least 6 with rotary")
        if self.image_loss_weight == 0:
            self.refuse("image_loss_weight", "above 0")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer."""
        cycle, last = ORDERS[self.attn_types] if isinstance(self.attn_types, str) else (self.attn_types, None)
        kinds = [cycle[i % len(cycle)] for i in range(self.depth)]
        return (*kinds[:-1], last or kinds[-1])

    @property
    def prefix_len(self) -> int:
        """P: positions before the image."""
        return self.text_seq_len + self.start_token

    @property
    def image_seq_len(self) -> int:
        return self.image_grid[0] * self.image_grid[1]

    @property
    def text_entries(self) -> int:
        """Embeddings of text: the vocabulary and a padding token for each position."""
        return self.num_text_tokens + self.text_seq_len


class DALLEOutput(NamedTuple):
    text_logits: Tensor | None  # [B, P - 1, text entries]
    image_logits: Tensor | None  # [B, codes given + 1 (at most N), image tokens]
    loss: Tensor | None  # [] fp32
    text_loss: Tensor | None
    image_loss: Tensor | None


class DecodeState:
    """What decoding keeps: a cache for each block and the number of image codes read so far."""

    def __init__(self, config: DALLEConfig):
        place = config.prefix_len, config.image_grid
        self.blocks = [BlockCache(AxialCache(kind, config.conv_kernel, *place),
                                  (ShiftCache(*place), ShiftCache(*place))) for kind in config.layer_kinds]
        self.position = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(block.attention.nbytes for block in self.blocks)


class DALLE(nn.Module):
    """The transformer.

    Args:
        config: sizes.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        tokenizer: set by loading and training; turns strings into ids (see `vlmfast.tasks.encode_prompts`).
        vae: the discrete VAE of the codes, or None; see `attach_vae`.
    """

    def __init__(self, config: DALLEConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.tokenizer, self.vae = config, None, None
        text, image = config.text_entries, config.num_image_tokens
        with nullcontext() if device is None else torch.device(device):
            self.to_logits = nn.Linear(config.dim, text + image)
            if not config.shared_embeddings:
                self.text_emb = nn.Embedding(text, config.dim)
                self.image_emb = nn.Embedding(image, config.dim)
            if config.rotary:
                angles = rotary_angles(config.prefix_len, config.image_grid, config.dim_head)
                self.register_buffer("rotary", angles)
            else:
                self.text_pos_emb = nn.Embedding(config.prefix_len, config.dim)
                self.image_row_emb = nn.Embedding(config.image_grid[0], config.dim)
                self.image_col_emb = nn.Embedding(config.image_grid[1], config.dim)
            self.layers = nn.ModuleList(AxialBlock(config, kind, i) for i, kind in enumerate(config.layer_kinds))
            self.norm = LayerNorm(config.dim)
            self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.layers:
            for last in (block.attn.fn.to_out, block.ff.fn.proj):
                nn.init.normal_(last.weight, std=0.02 * (2 * self.config.depth) ** -0.5)

    def attach_vae(self, vae: nn.Module) -> None:
        """Sets `vae`.

        Raises:
            ValueError: its codes are not this model's.
        """
        if vae.vocab_size != self.config.num_image_tokens:
            raise ValueError(f"DALLE: the discrete VAE has {vae.vocab_size} codes, num_image_tokens is "
                             f"{self.config.num_image_tokens}")
        object.__setattr__(self, "vae", vae)  # not a submodule: neither trained nor saved with this model

    @property
    def dtype(self) -> torch.dtype:
        return self.to_logits.weight.dtype

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of a picture in codes."""
        return self.config.image_grid

    def null_text(self, batch: int) -> Tensor:
        """[B, T] of an empty prompt: all padding."""
        return torch.zeros(batch, self.config.text_seq_len, dtype=torch.int64)

    def pad_text(self, text: Tensor) -> Tensor:
        """[B, 0..T] ids with 0 for padding -> [B, P]: every padding its position's own token, after a start token.

        Raises:
            TypeError: not integers. ValueError: longer than the text context, or an id outside the vocabulary.
        """
        config = self.config
        if text.is_floating_point() or text.dtype == torch.bool:
            raise TypeError(f"DALLE: text is {text.dtype}, must be integers")
        if text.ndim != 2 or text.shape[1] > config.text_seq_len:
            raise ValueError(f"DALLE: text has shape {list(text.shape)}, must be [B, 0..{config.text_seq_len}]: the "
                             "prompt is longer than the text context")
        check_ids("DALLE", "text", text, config.num_text_tokens)
        text = F.pad(text, (0, config.text_seq_len - text.shape[1]))
        padding = torch.arange(config.text_seq_len, device=text.device) + config.num_text_tokens
        text = torch.where(text == 0, padding, text)
        return F.pad(text, (1, 0)) if config.start_token else text

    def forward(self, text: Tensor, image_codes: Tensor | None = None, return_loss: bool = False) -> DALLEOutput:
        """Scores of every position, or the loss.

        Args:
            text: [B, 0..T] integer ids, 0 is padding.
            image_codes: [B, 0..N] or [B, height, width] integer codes, or None for none.
            return_loss: score all codes (there must be N) without writing the logits.

        Returns:
            Logits of the text positions that have a next one, over text tokens and paddings, and of the image
            positions that follow from the codes given, over codes; or with `return_loss`
            (text loss + w image loss) / (1 + w), each loss the mean over its own positions, w = image_loss_weight.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        padded = self.pad_text(text)
        codes = self._check_codes(image_codes, len(text), text.device)
        states = self.norm(self._last(self._states(padded, codes)))
        prefix, count, total = self.config.prefix_len, codes.shape[1], self.config.image_seq_len
        text_states, image_states = states[:, : prefix - 1], states[:, prefix - 1 : prefix - 1 + min(count + 1, total)]
        entries, (weight, bias) = self.config.text_entries, (self.to_logits.weight, self.to_logits.bias)
        if not return_loss:
            return DALLEOutput(F.linear(text_states, weight[:entries], bias[:entries]),
                               F.linear(image_states, weight[entries:], bias[entries:]), None, None, None)
        if count != total:
            raise ValueError(f"DALLE: image_codes has {count} codes an image, the loss needs all {total}")
        text_loss = linear_cross_entropy(text_states.flatten(0, 1), weight[:entries], bias[:entries],
                                         padded[:, 1:].flatten())
        image_loss = linear_cross_entropy(image_states.flatten(0, 1), weight[entries:], bias[entries:],
                                          codes.flatten())
        share = self.config.image_loss_weight
        return DALLEOutput(None, None, (text_loss + share * image_loss) / (1 + share), text_loss, image_loss)

    def prefill(self, text: Tensor, image_codes: Tensor | None = None, copies: int = 1) -> tuple[Tensor, DecodeState]:
        """Reads a prompt, and the first codes of an image where given, and is ready to write on.

        Args:
            text: [B, 0..T]. image_codes: [B, 0..N-1] codes to go on from, row by row.
            copies: images to draw of each prompt; the prompt is read once.

        Returns:
            (logits of the next code [B copies, image tokens], state for `step`).
        """
        codes = self._check_codes(image_codes, len(text), text.device)
        if codes.shape[1] >= self.config.image_seq_len:
            raise ValueError(f"DALLE: image_codes has {codes.shape[1]} codes, must be fewer than the image's "
                             f"{self.config.image_seq_len}")
        state = DecodeState(self.config)
        state.position = codes.shape[1]
        states = self._states(self.pad_text(text), codes, state, copies)
        return self._image_logits(states[:, -1:]).repeat_interleave(copies, 0), state

    def step(self, codes: Tensor, state: DecodeState) -> Tensor:
        """One code [B] further: logits of the next one [B, image tokens]. Equal to `forward`'s at that position.

        Raises:
            ValueError: the image is complete.
        """
        position, config = state.position, self.config
        if position >= config.image_seq_len - 1:
            raise ValueError(f"DALLE: the image already has {position + 1} of {config.image_seq_len} codes")
        x = self._embed_image(codes[:, None], position)
        place = config.prefix_len + position
        rotary = self.rotary[place : place + 1] if config.rotary else None
        for block, cache in zip(self.layers, state.blocks, strict=True):
            x = block.step(x, position, cache, rotary)
        state.position += 1
        return self._image_logits(x)

    def _states(self, padded: Tensor, codes: Tensor, state: DecodeState | None = None, copies: int = 1) -> Tensor:
        """[B, P], [B, n] -> [B, P + n, C]."""
        config = self.config
        x = F.embedding(padded, self._tables()[0])
        if not config.rotary:
            x = x + self.text_pos_emb.weight
        x = torch.cat([x, self._embed_image(codes, 0)], 1)
        rotary = self.rotary[: x.shape[1]] if config.rotary else None
        caches = [None] * config.depth if state is None else state.blocks
        for block, cache in zip(self.layers, caches, strict=True):
            x = block(x, config.prefix_len, config.image_grid, rotary, cache, copies)
        return x

    def _embed_image(self, codes: Tensor, start: int) -> Tensor:
        x = F.embedding(codes, self._tables()[1])  # [B, n, C]
        if not self.config.rotary:
            at, width = torch.arange(start, start + codes.shape[1], device=codes.device), self.config.image_grid[1]
            x = x + self.image_row_emb(at // width) + self.image_col_emb(at % width)
        return x

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self.config.shared_embeddings:
            return self.to_logits.weight.split([self.config.text_entries, self.config.num_image_tokens])
        return self.text_emb.weight, self.image_emb.weight

    def _last(self, x: Tensor) -> Tensor:
        return x / x.amax(-1, keepdim=True).detach() if self.config.divide_max else x

    def _image_logits(self, x: Tensor) -> Tensor:
        """[B, 1, C] -> [B, image tokens]."""
        entries = self.config.text_entries
        x = self.norm(self._last(x[:, 0]))
        return few_row_linear(x, self.to_logits.weight[entries:], self.to_logits.bias[entries:])

    def _check_codes(self, codes: Tensor | None, batch: int, device) -> Tensor:
        if codes is None:
            return torch.zeros(batch, 0, dtype=torch.int64, device=device)
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise TypeError(f"DALLE: image_codes are {codes.dtype}, must be integers")
        if codes.ndim == 3:
            if tuple(codes.shape[1:]) != self.config.image_grid:
                raise ValueError(f"DALLE: image_codes is a grid {list(codes.shape[1:])}, must be "
                                 f"{list(self.config.image_grid)}")
            codes = codes.flatten(1)
        if codes.ndim != 2 or len(codes) != batch or codes.shape[1] > self.config.image_seq_len:
            raise ValueError(f"DALLE: image_codes has shape {list(codes.shape)}, must be [{batch}, "
                             f"0..{self.config.image_seq_len}]")
        check_ids("DALLE", "image_codes", codes, self.config.num_image_tokens)
        return codes


def _small(dim: int, depth: int, text: int, tokens: int, codes: int, side: int, **more) -> dict:
    return dict(dim=dim, depth=depth, heads=dim // 64, num_text_tokens=tokens, text_seq_len=text,
                num_image_tokens=codes, image_grid=(side, side), **more)


PRESETS: dict[str, dict] = {
    "dalle-12b": {},
    "dalle-small": _small(512, 12, 256, 16384, 8192, 32),  # the 12B sequence, L = 1280
    "dalle-base": _small(256, 8, 64, 4096, 1024, 16, conv_kernel=7),
    "dalle-tiny": _small(128, 4, 16, 1024, 256, 8, conv_kernel=5),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> DALLE:
    """A freshly initialised preset; `overrides` replace config fields."""
    return DALLE(DALLEConfig.from_dict({**PRESETS[name], **overrides}), device=device)
