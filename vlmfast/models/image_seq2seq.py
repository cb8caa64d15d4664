"""A small image-conditioned encoder-decoder that writes text: captions, and translations of a text with its picture.

The encoder reads the source tokens, the visual tokens, or both; the decoder attends to what the encoder made of them.
Visual tokens are the grid of a convolutional stem or given region features. Layers are those of Attention Is All You
Need (Vaswani et al. 2017, arXiv:1706.03762); the gate on the picture follows Multimodal Transformer for Multimodal
Machine Translation's line of work (Wu et al. 2021, Good for Misconceived Reasons, arXiv:2105.14462, eq. 3-4).

Sizes: B batch, T source tokens, R visual tokens, S target tokens, P pixels, C width, V vocabulary, H heads.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.bert import ACTIVATIONS, EPS, TextEmbeddings, init_bert
from ..layers.decoder import ConvStem, DecoderLayer
from ..layers.single_stream import BertEncoder, Segment, SingleStream, set_eps
from ..layers.streams import check_ids, check_regions
from ..layers.transformer import LayerNorm
from .config import ModelConfig

SOURCE, VISUAL = 0, 1  # rows of the segment table


@dataclass(frozen=True, kw_only=True)
class ImageSeq2SeqConfig(ModelConfig):
    """Sizes and options; ids of special tokens are those of bert-base-uncased."""

    vocab_size: int = 30522  # shared by source and target
    hidden_size: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 128  # of source and target each
    initializer_range: float = 0.02
    layer_norm_eps: float = EPS
    pad_token_id: int = 0
    bos_token_id: int = 101
    eos_token_id: int = 102

    visual: str = "grid"  # visual tokens of pixels; "regions": of given features; "none": text only
    fusion: str = "concat"  # encoder input [source ; visual]; "gated": the pooled picture is mixed into the source
    image_size: int = 64
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    stem_widths: tuple[int, ...] = (32, 64, 128)  # each halves the side of the grid
    region_dim: int = 2048
    region_loc_dim: int = 4  # x1, y1, x2, y2, relative to the image; 0: no boxes

    def __post_init__(self):
        self.check_numbers(from_zero=("pad_token_id", "bos_token_id", "eos_token_id", "region_loc_dim"))
        self.check_choice("hidden_act", ACTIVATIONS)
        self.check_choice("visual", ("grid", "regions", "none"))
        self.check_choice("fusion", ("concat", "gated"))
        self.check_heads("hidden_size", "num_attention_heads")
        for name in ("stem_widths", "image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.stem_widths or not all(type(width) is int and width > 0 for width in self.stem_widths):
            self.refuse("stem_widths", "positive integers")
        if self.image_size % 2 ** len(self.stem_widths):
            self.refuse("image_size", f"a multiple of {2 ** len(self.stem_widths)}, for {len(self.stem_widths)} stages")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) >= self.vocab_size:
                self.refuse(name, f"less than vocab_size, {self.vocab_size}")

    @property
    def grid(self) -> int:
        """Side of the grid of visual tokens."""
        return self.image_size // 2 ** len(self.stem_widths)


@dataclass
class ImageSeq2SeqOutput:
    """Scores and states; `memory` is what the decoder attends to."""

    logits: dict[str, Tensor]  # "lm" [B, S, V]: position s scores the token that follows decoder_input_ids[:, s]
    text_hidden: Tensor  # [B, T, C] of the encoder; T is 0 without a source
    image_hidden: Tensor  # [B, R, C] likewise; R is 0 without a picture, and with fusion "gated"
    memory: "Memory" = field(repr=False)


class Memory(NamedTuple):
    """What the encoder made of its input: states [B, T + R, C], and which rows exist [B, T + R] bool."""

    states: Tensor
    keep: Tensor


class State(NamedTuple):
    """A text being written, its rows the B hypotheses; `tasks.decoding.select_rows` reorders it.

    Attributes:
        memory: per layer keys and values of the encoder's rows, [B, T + R, H, D] each.
        keep: [B, T + R] bool.
        past: per layer keys and values of the tokens read so far, [B, n, H, D] each; empty before the first step.
    """

    memory: tuple[tuple[Tensor, Tensor], ...]
    keep: Tensor
    past: tuple[tuple[Tensor, Tensor], ...] = ()


class VisualTokens(nn.Module):
    """Pixels or regions to [B, R, C]: LN(W v + position or box + segment), dropout."""

    def __init__(self, config: ImageSeq2SeqConfig):
        super().__init__()
        width, channels = config.hidden_size, config.region_dim
        self.position_embeddings = self.location = None
        if config.visual == "grid":
            channels = config.stem_widths[-1]
            self.stem = ConvStem(config.stem_widths)
            self.position_embeddings = nn.Embedding(config.grid**2, width)
        elif config.region_loc_dim:
            self.location = nn.Linear(config.region_loc_dim, width)
        self.projection = nn.Linear(channels, width)
        self.LayerNorm = LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, feat: Tensor, loc: Tensor | None, segment: Tensor) -> Tensor:
        if self.position_embeddings is not None:
            x = self.projection(self.stem(feat)) + self.position_embeddings.weight
        else:
            x = self.projection(feat) + (0 if self.location is None else self.location(loc))
        return self.dropout(self.LayerNorm(x + segment))


class Gate(nn.Module):
    """H <- H + g * W_v v with g = sigmoid(W [H ; v]): how much of the pooled picture each source token takes."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.value = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, text: Tensor, picture: Tensor) -> Tensor:  # [B, T, C], [B, C] -> [B, T, C]
        picture = picture[:, None].expand_as(text)
        return text + torch.sigmoid(self.gate(torch.cat([text, picture], dim=-1))) * self.value(picture)


class ImageSeq2Seq(nn.Module):
    """Encoder and decoder with one word table for source, target and output.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        tokenizer: None until a caller sets one.
    """

    def __init__(self, config: ImageSeq2SeqConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.tokenizer = config, None
        width, drop = config.hidden_size, config.hidden_dropout_prob
        layer = (width, config.num_attention_heads, config.intermediate_size, drop,
                 config.attention_probs_dropout_prob, config.hidden_act)
        with nullcontext() if device is None else torch.device(device):
            self.embeddings = TextEmbeddings(config.vocab_size, width, config.max_position_embeddings, 2, drop, ())
            self.visual = None if config.visual == "none" else VisualTokens(config)
            self.gate = Gate(width) if config.visual != "none" and config.fusion == "gated" else None
            self.encoder = BertEncoder(config.encoder_layers, *layer)
            self.target_positions = nn.Embedding(config.max_position_embeddings, width)
            self.target_norm = LayerNorm(width, eps=EPS)
            self.decoder = nn.ModuleList(DecoderLayer(*layer) for _ in range(config.decoder_layers))
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
            self.dropout = nn.Dropout(drop)
            init_bert(self, config.initializer_range)
        set_eps(self, config.layer_norm_eps)

    @property
    def word_table(self) -> Tensor:
        return self.embeddings.word_embeddings.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.word_table.dtype

    @property
    def preprocess(self):
        """The `ImagePreprocess` of the grid: the picture is padded with white to a square; None for other models."""
        if self.config.visual != "grid":
            return None
        from ..data.images import ImagePreprocess

        config = self.config
        return ImagePreprocess(config.image_size, config.image_mean, config.image_std, "longest", fill_color=255)

    def available(self) -> tuple[str, ...]:
        """The names that `forward` accepts in `heads`."""
        return ("lm",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        image: Tensor | None = None,
        image_feat: Tensor | None = None,
        image_loc: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor,
        text_lengths: Tensor | None = None,
        num_regions: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
    ) -> ImageSeq2SeqOutput:
        """Scores of every next token (teacher forcing).

        Args:
            input_ids ... num_regions: the source and the picture, as in `encode`.
            decoder_input_ids: [B, S] integers, `bos_token_id` first; what stands behind a text's end does not reach
                the scores before it.
            heads: ("lm",) or None for the scores, () for the states alone.

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names something else.
        """
        if unknown := set(heads or ()) - {"lm"}:
            raise ValueError(f"heads: has {', '.join(map(repr, sorted(unknown)))}, this model has lm")
        memory = self.encode(input_ids, image, image_feat, image_loc, attention_mask, image_mask,
                             text_lengths=text_lengths, num_regions=num_regions)
        check_ids(decoder_input_ids)
        if len(decoder_input_ids) != len(memory.states):
            raise ValueError(f"decoder_input_ids: has {len(decoder_input_ids)} rows, the input {len(memory.states)}; "
                             "must be as many")
        logits = {}
        if heads != ():
            logits["lm"] = self._scores(self._decode(decoder_input_ids, self.start(memory))[0])
        tokens = 0 if input_ids is None else input_ids.shape[1]
        return ImageSeq2SeqOutput(logits, memory.states[:, :tokens], memory.states[:, tokens:], memory)

    def encode(
        self,
        input_ids: Tensor | None = None,
        image: Tensor | None = None,
        image_feat: Tensor | None = None,
        image_loc: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        num_regions: Tensor | None = None,
    ) -> Memory:
        """What the decoder attends to.

        Args:
            input_ids: [B, T] source tokens, or None: the picture alone (captions; fusion "concat").
            image: [B, 3, P, P] normalised pixels, with visual "grid".
            image_feat, image_loc: [B, R, region_dim] and [B, R, region_loc_dim] (None where that is 0), with visual
                "regions". Without pixels and regions the text is all there is; the gate is then left out.
            attention_mask, image_mask: [B, T] and [B, R], 1 or True keeps a row; or
            text_lengths, num_regions: [B] counts.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        config = self.config
        feat = self._checked_picture(image, image_feat, image_loc)
        if self.gate is not None and input_ids is None:
            raise ValueError("input_ids: is None, must be given to a model with fusion 'gated'")
        segments, table = [], self.embeddings.token_type_embeddings
        text = visual = None
        if feat is not None:
            rows = feat if image is None else feat.new_empty(len(feat), config.grid**2, 0)
            segment = Segment.of("image_mask", image_mask, "num_regions", num_regions, rows)
            if segment.counted:  # NaN behind the count reaches nothing
                feat, loc = (None if part is None else part.masked_fill(~segment.keep[..., None], 0)
                             for part in (feat, image_loc))
            else:
                loc = image_loc
            visual = self.visual(feat.to(self.dtype), None if loc is None else loc.to(self.dtype), table.weight[VISUAL])
            segments.append(segment)
        elif image_mask is not None or num_regions is not None:
            raise ValueError("image_feat: is None, must be given with image_mask or num_regions")
        if input_ids is not None:
            check_ids(input_ids)
            if feat is not None and len(input_ids) != len(feat):
                raise ValueError(f"input_ids: has {len(input_ids)} rows, the picture {len(feat)}; must be as many")
            text = self.embeddings(input_ids)
            segments.insert(0, Segment.of("attention_mask", attention_mask, "text_lengths", text_lengths, input_ids))
        elif attention_mask is not None or text_lengths is not None:
            raise ValueError("input_ids: is None, must be given with attention_mask or text_lengths")
        if not segments:
            raise ValueError("input_ids: is None like the picture, at least one must be given")
        given = visual if text is None else text
        if self.gate is not None:
            segments = segments[:1]
        stream = SingleStream.of(len(given), segments, self.dtype, given.device)
        x = text if self.gate is not None else stream.join(text, visual)
        states, _ = self.encoder(x, stream)
        if self.gate is not None and visual is not None:
            states = self.gate(states, _mean(visual, segment.keep))
        return Memory(states, stream.keep)

    def _checked_picture(self, image: Tensor | None, feat: Tensor | None, loc: Tensor | None) -> Tensor | None:
        """The pixels or the region features, or None."""
        config = self.config
        if image is not None:
            if config.visual != "grid":
                raise ValueError(f"image: is given to a model with visual {config.visual!r}, must be None")
            if feat is not None or loc is not None:
                raise ValueError("image_feat: given together with image, must be None")
            side = config.image_size
            if image.ndim != 4 or image.shape[1:] != (3, side, side):
                raise ValueError(f"image: has shape {list(image.shape)}, must be [B, 3, {side}, {side}]")
            return image
        if feat is None:
            return None
        if config.visual != "regions":
            raise ValueError(f"image_feat: is given to a model with visual {config.visual!r}, must be None")
        if loc is None and config.region_loc_dim:
            raise ValueError("image_loc: is None, must be given with image_feat")
        check_regions(feat, feat[..., :0] if loc is None else loc, (config.region_dim, config.region_loc_dim))
        return feat

    def start(self, memory: Memory) -> State:
        """The state of B texts before their first token."""
        return State(tuple(layer.cross_attention.read(memory.states) for layer in self.decoder), memory.keep)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Scores of the token that follows, for `vlmfast.tasks.decoding`.

        Args:
            tokens: [B, n] everything so far, `bos_token_id` first; only what `state` has not read is computed.
            state: from `start` or the last step.

        Returns:
            (logits [B, V], the state with these tokens read).

        Raises:
            ValueError: nothing new in `tokens`, or more of them than the model has positions.
        """
        states, state = self._decode(tokens, state)
        return self._scores(states[:, -1]), state

    def _decode(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """States [B, new, C] of the tokens that `state` has not read."""
        known = state.past[0][0].shape[1] if state.past else 0
        longest = self.config.max_position_embeddings
        if not known < tokens.shape[1] <= longest:
            raise ValueError(f"tokens: has {tokens.shape[1]} columns, must have {known + 1} to {longest}")
        position = torch.arange(known, tokens.shape[1], device=tokens.device)
        x = self.embeddings.word_embeddings(tokens[:, known:]) + self.target_positions(position)
        x, past = self.dropout(self.target_norm(x)), []
        for i, layer in enumerate(self.decoder):
            x, both = layer(x, state.memory[i], state.keep, state.past[i] if known else None)
            past.append(both)
        return x, state._replace(past=tuple(past))

    def _scores(self, x: Tensor) -> Tensor:
        return F.linear(x, self.word_table, self.bias)


def _mean(x: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over the rows that exist: [B, R, C], [B, R] -> [B, C]."""
    if keep is None:
        return x.mean(1)
    return x.masked_fill(~keep[..., None], 0).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)


PRESETS: dict[str, dict] = {
    "image-seq2seq-base": {},
    "image-seq2seq-tiny": dict(hidden_size=192, encoder_layers=2, decoder_layers=2, num_attention_heads=6,
                               intermediate_size=384, stem_widths=(24, 48, 96)),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> ImageSeq2Seq:
    """A freshly initialised preset; `overrides` replace config fields."""
    return ImageSeq2Seq(ImageSeq2SeqConfig.from_dict({**PRESETS[name], **overrides}), device=device)
