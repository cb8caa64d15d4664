"""One sequence of text and visual rows through a BERT encoder: what the single-stream models share.

The sequence is a row of segments, for example [text ; regions] or [text ; objects ; END], each padded on its own to
the longest of the batch. Where counts of rows are known, the encoder sees only the rows that exist, one example behind
the other, so that padding costs nothing; the values of those rows are the same as with masks, or as in layouts that
move each example's padding to its end.

Sizes: B batch, S rows of the padded sequence, N rows of all its examples without padding, C width, H heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .bert import BertLayer
from .streams import MASKED, Rows, check_ids, check_regions, read_layout
from .transformer import LayerNorm


@dataclass(frozen=True)
class Segment:
    """The rows of one segment.

    Attributes:
        size: rows after padding.
        keep: [B, size] bool, True where a row exists; None: all.
        counted: `keep` comes from counts: the rows behind them are left out of the computation. False: it comes from
            a mask, whose zeros add -10000 to the scores, as in the public code.
    """

    size: int
    keep: Tensor | None = None
    counted: bool = False

    @classmethod
    def of(cls, mask_name: str, mask: Tensor | None, lengths_name: str, lengths: Tensor | None,
           like: Tensor) -> "Segment":
        """From a [B, S] mask or from [B] counts (or neither) of the [B, S, ...] rows of `like`, checked.

        Raises:
            TypeError, ValueError: see `as_mask` and `as_lengths`; both are given.
        """
        size = like.shape[1]
        mask, lengths = read_layout(mask_name, mask, lengths_name, lengths, (len(like), size))
        if lengths is not None:
            return cls(size, torch.arange(size, device=like.device) < lengths.to(like.device)[:, None], counted=True)
        return cls(size, None if mask is None else mask.bool())


@dataclass(frozen=True)
class SingleStream:
    """Layout of one sequence made of segments.

    Attributes:
        batch: B.
        segments: in the order of the sequence.
        device: of the tensors.
        rows: what attention needs to know.
        dense: attention needs more than which rows exist, so that the stream stays padded.
        packing: [N] where the packed rows lie among the B * S padded ones; None while padded.
    """

    batch: int
    segments: tuple[Segment, ...]
    device: torch.device
    rows: Rows = Rows()
    dense: bool = False
    packing: Tensor | None = None

    @classmethod
    def of(cls, batch: int, segments: list[Segment], dtype: torch.dtype, device: torch.device) -> "SingleStream":
        """From segments whose `keep` has B rows, or one row for all; dtype is that of the additive mask."""
        stream = cls(batch, tuple(segments), device)
        if all(segment.keep is None for segment in segments):
            return stream
        bias = [
            torch.zeros(batch, segment.size, dtype=dtype, device=device) if segment.keep is None else
            torch.zeros(segment.keep.shape, dtype=dtype, device=device)
            .masked_fill(~segment.keep, -torch.inf if segment.counted else MASKED).expand(batch, -1)
            for segment in segments
        ]
        return replace(stream, rows=Rows(bias=torch.cat(bias, dim=1)[:, None, None]))

    @classmethod
    def of_inputs(cls, input_ids: Tensor | None, feat: Tensor | None, loc: Tensor | None, widths: tuple[int, int],
                  dtype: torch.dtype, attention_mask: Tensor | None = None, image_mask: Tensor | None = None,
                  text_lengths: Tensor | None = None, num_regions: Tensor | None = None,
                  extra: int = 0) -> "SingleStream":
        """[text ; regions ; extra] with a model's inputs checked; text or regions may be absent, with size 0.

        Args:
            input_ids: [B, T], or [1, T], one text for all images.
            feat, loc: [B, R, widths[0]] and [B, R, widths[1]]; loc is None for models without boxes.
            dtype: of the additive mask.
            attention_mask, image_mask: [B, T] and [B, R] masks; or
            text_lengths, num_regions: [B] counts of rows.
            extra: rows behind the regions that every example has.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        if input_ids is None and feat is None:
            raise ValueError("input_ids: is None like image_feat, at least one must be given")
        text, image = Segment(0), Segment(0)
        if input_ids is not None:
            check_ids(input_ids)
            text = Segment.of("attention_mask", attention_mask, "text_lengths", text_lengths, input_ids)
        elif attention_mask is not None or text_lengths is not None:
            raise ValueError("input_ids: is None, must be given with attention_mask or text_lengths")
        if feat is not None:
            check_regions(feat, feat[..., :0] if loc is None else loc, (widths[0], 0 if loc is None else widths[1]))
            image = Segment.of("image_mask", image_mask, "num_regions", num_regions, feat)
        elif image_mask is not None or num_regions is not None:
            raise ValueError("image_feat: is None, must be given with image_mask or num_regions")
        given = input_ids if feat is None else feat
        if input_ids is not None and len(input_ids) not in (1, len(given)):
            raise ValueError(f"input_ids: has {len(input_ids)} rows, image_feat {len(given)}; must be as many, or one")
        segments = [text, image] + ([Segment(extra)] if extra else [])
        return cls.of(len(given), segments, dtype, given.device)

    def with_prefix(self, prefix: Tensor) -> "SingleStream":
        """Prefix language modelling: rows before prefix [B] are seen by all rows, the others by themselves and later
        ones. Such a stream stays padded."""
        return replace(self, rows=replace(self.rows, prefix=prefix), dense=True)

    def with_text_prefix(self, prefix: Tensor, dtype: torch.dtype) -> "SingleStream":
        """As `with_prefix` where the text is segment 0: its rows from prefix [B] on are seen by themselves and later
        rows of the text, all other rows by all. dtype is that of the additive mask."""
        size, tokens = sum(segment.size for segment in self.segments), self.segments[0].size
        place = torch.arange(size, device=self.device)
        written = (place >= prefix.to(self.device)[:, None]) & (place < tokens)  # [B, S]
        reader = place[:, None]
        hidden = written[:, None] & ((place > reader) | (reader >= tokens))  # [B, S, S]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill(hidden, -torch.inf)
        return self.with_bias(bias[:, None])

    def with_bias(self, bias: Tensor) -> "SingleStream":
        """With [B|1, H|1, S|1, S] added to the scores. Such a stream stays padded."""
        old = self.rows.bias
        return replace(self, rows=replace(self.rows, bias=bias if old is None else old + bias), dense=True)

    @property
    def keep(self) -> Tensor:
        """[B, S] bool, True where a row exists."""
        parts = [torch.ones(self.batch, segment.size, dtype=torch.bool, device=self.device) if segment.keep is None
                 else segment.keep.expand(self.batch, -1) for segment in self.segments]
        return torch.cat(parts, dim=1)

    def blanked(self, index: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """A segment's inputs [B, size, ...] with 0 in the rows that counts leave out, so that nothing there, NaN
        included, reaches a result or a gradient."""
        segment = self.segments[index]
        if not segment.counted:
            return parts
        return tuple(part.masked_fill(~segment.keep[..., None], 0) for part in parts)

    def join(self, *parts: Tensor | None) -> Tensor:
        """The segments' [B, size, C] or [1, size, C] (None for size 0) as one [B, S, C]."""
        found = [part.expand(self.batch, -1, -1) for part in parts if part is not None]
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, S, ...] -> one [B, size, ...] for each segment."""
        return x.split([segment.size for segment in self.segments], dim=1)

    def packed(self, x: Tensor) -> tuple[Tensor, "SingleStream"]:
        """x as [N, C] where every missing row is known from counts, unchanged otherwise."""
        known = [segment.counted for segment in self.segments if segment.keep is not None]
        if self.packing is not None or self.dense or not known or not all(known) or torch.compiler.is_compiling():
            return x, self
        keep = self.keep
        packing, lengths = keep.flatten().nonzero()[:, 0], keep.sum(1)
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        stream = replace(self, rows=Rows(lengths=lengths, offsets=offsets), packing=packing)
        return x.flatten(0, 1)[packing], stream

    def padded(self, x: Tensor) -> Tensor:
        """x as [B, S, C]; rows that counts leave out are 0."""
        if self.packing is not None:
            size = sum(segment.size for segment in self.segments)
            out = x.new_zeros(self.batch * size, x.shape[-1]).index_copy(0, self.packing, x)
            return out.unflatten(0, (self.batch, size))
        if not any(segment.counted for segment in self.segments):
            return x
        parts = zip(self.segments, self.split(x), strict=True)
        return torch.cat([part.masked_fill(~segment.keep[..., None], 0) if segment.counted else part
                          for segment, part in parts], dim=1)


def set_eps(module: nn.Module, eps: float) -> None:
    """Gives every LayerNorm inside `module` this epsilon."""
    for part in module.modules():
        if isinstance(part, LayerNorm):
            part.eps = eps


class BertEncoder(nn.Module):
    """BERT layers over one sequence, under the public key `layer`.

    Args:
        layers, width, heads, inner: how many, C, H and the feed-forward width.
        dropout, attention_dropout: after the output projections; on the attention weights.
        activation: "gelu", "relu" or "swish".
    """

    def __init__(self, layers: int, width: int, heads: int, inner: int, dropout: float = 0.1,
                 attention_dropout: float = 0.1, activation: str = "gelu"):
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(width, heads, inner, dropout, attention_dropout, activation) for _ in range(layers)
        )

    def forward(self, x: Tensor, stream: SingleStream, return_probs: bool = False):
        """[B, S, C] -> ([B, S, C], probabilities of each layer [B, H, S, S], or an empty tuple)."""
        if not return_probs:
            x, stream = stream.packed(x)
        maps = []
        for layer in self.layer:
            x, probs = layer(x, stream.rows, return_probs=return_probs)
            maps.append(probs)
        return stream.padded(x), tuple(maps) if return_probs else ()
