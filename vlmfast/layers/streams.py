"""How the rows of a stream are laid out, and attention over them through `vlmfast.ops.attention`.

Where counts of rows are known, both streams travel packed: the rows that exist, one example behind the other, so that
padding costs nothing in projections and feed-forward networks, where nearly all of a layer's time goes.

Sizes: B batch, S rows, N rows of all examples without padding, H heads, D channels per head.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.attention import attention, attention_varlen, co_attention, co_attention_varlen

MASKED = -10000.0  # what the public BERT weights were trained with; a fully masked row sees its raw scores


@dataclass(frozen=True)
class Rows:
    """Which rows of a [B, S, ...] stream exist; or where the examples of a packed [N, ...] stream begin.

    Attributes:
        bias: [B, 1, 1, S] added to the scores of these rows as keys, or None.
        lengths: [B] rows that exist, a prefix; padding is then skipped and its attention output is 0. None: all rows.
        offsets: [B + 1] int32, example i holds packed rows offsets[i] to offsets[i + 1]; None: not packed.
        prefix: [B] integers: rows before it are seen by all, the others only by later rows; None: all are.
    """

    bias: Tensor | None = None
    lengths: Tensor | None = None
    offsets: Tensor | None = None
    prefix: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, lengths: Tensor | None, dtype: torch.dtype) -> "Rows":
        """From a [B, S] mask (1 or True keeps, holes allowed) or from lengths."""
        if mask is None:
            return cls(None, lengths)
        return cls((1 - mask[:, None, None].to(dtype)) * MASKED, lengths)

    def take(self, index: Tensor) -> "Rows":
        """The same for examples `index` [P]."""
        return Rows(*(None if part is None else part[index] for part in (self.bias, self.lengths)))

    def owners(self) -> Tensor:
        """[N] which example each packed row belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)


def as_mask(name: str, value: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A [B, S] mask of bool or 0/1 numbers, checked.

    Raises:
        ValueError: another shape, or values other than 0 and 1 (an additive mask, for example).
    """
    if value is None:
        return None
    if value.shape != shape:
        raise ValueError(f"{name}: has shape {list(value.shape)}, must be {list(shape)}")
    if value.dtype != torch.bool and _readable(value) and not ((value == 0) | (value == 1)).all():
        raise ValueError(f"{name}: holds values other than 0 and 1; 1 keeps a row, 0 masks it")
    return value


def as_lengths(name: str, value: Tensor | None, batch: int, longest: int) -> Tensor | None:
    """[B] row counts, checked.

    Raises:
        TypeError: not integers.
        ValueError: another shape, or counts outside 0..longest.
    """
    if value is None:
        return None
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{name}: is {value.dtype}, must be integers")
    if value.shape != (batch,):
        raise ValueError(f"{name}: has shape {list(value.shape)}, must be [{batch}]")
    if batch and _readable(value) and not 0 <= int(value.min()) <= int(value.max()) <= longest:
        raise ValueError(f"{name}: runs from {int(value.min())} to {int(value.max())}, must lie in 0..{longest}")
    return value


def _readable(value: Tensor) -> bool:
    """Whether looking at values costs nothing: not while compiling, and not where it would wait for a GPU."""
    return not torch.compiler.is_compiling() and value.device.type == "cpu"


@dataclass(frozen=True)
class Streams:
    """Layout of a text and a region stream that attend to each other.

    Attributes:
        text, image: the rows of each.
        text_keep, image_keep: [B, T] and [B, R], 1 or True where a row exists.
        bias: [B, 1, T, R] added to the scores of both directions, or None.
        all_pairs: pair every text with every image instead of the i-th with the i-th.
        packing: where the packed rows lie among the B * T and B * R padded ones, or None while padded.
    """

    text: Rows
    image: Rows
    text_keep: Tensor
    image_keep: Tensor
    bias: Tensor | None = None
    all_pairs: bool = False
    packing: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, input_ids: Tensor, feat: Tensor, loc: Tensor, widths: tuple[int, int], dtype: torch.dtype,
           attention_mask: Tensor | None = None, image_mask: Tensor | None = None, text_lengths: Tensor | None = None,
           num_regions: Tensor | None = None) -> "Streams":
        """Checks a model's inputs and reads the layout off them.

        Args:
            input_ids, feat, loc: [B, T] or [1, T]; [B, R, widths[0]]; [B, R, widths[1]].
            dtype: of the additive masks.
            attention_mask, image_mask: [B, T] and [B, R] masks; or
            text_lengths, num_regions: [B] counts of rows.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        check_ids(input_ids)
        check_regions(feat, loc, widths)
        if len(input_ids) not in (1, len(feat)):
            raise ValueError(f"input_ids: has {len(input_ids)} rows, image_feat {len(feat)}; must be as many, or one")
        text, text_keep = _rows("attention_mask", attention_mask, "text_lengths", text_lengths, input_ids, dtype)
        image, image_keep = _rows("image_mask", image_mask, "num_regions", num_regions, feat, dtype)
        return cls(text, image, text_keep, image_keep)

    def with_task_token(self) -> "Streams":
        """For a text with one more token after token 0."""
        bias, text = self.bias, self.text
        if bias is not None:
            bias = torch.cat([bias[:, :, :1], torch.zeros_like(bias[:, :, :1]), bias[:, :, 1:]], dim=2)
        text = Rows(None if text.bias is None else torch.cat([torch.zeros_like(text.bias[..., :1]), text.bias], -1),
                    None if text.lengths is None else text.lengths + 1)
        keep = torch.cat([torch.ones_like(self.text_keep[:, :1]), self.text_keep], dim=1)
        return replace(self, text=text, text_keep=keep, bias=bias)

    def paired(self, text: Tensor, image: Tensor, pack: bool) -> tuple[Tensor, Tensor, "Streams", "Pairs | None"]:
        """Makes row i * images + j of both streams text i and image j (`all_pairs`), or repeats the only text.

        Args:
            pack: whether the pairs go without padding where counts of rows are known.

        Returns:
            The states, the layout after the next co-attention layer, and the pairs by which that layer joins the
            states, which still hold every example once. Pairs are None, and nothing changes, where the i-th text
            meets the i-th image.
        """
        texts, images = len(self.text_keep), len(self.image_keep)
        if not self.all_pairs and texts == images:
            return text, image, self, None
        columns = torch.arange(images, device=image.device)
        rows = torch.zeros_like(columns)
        if self.all_pairs:
            rows, columns = columns[:texts].repeat_interleave(images), columns.repeat(texts)
        if self.packing is not None:
            text, image = self.padded(text, image)
        streams = Streams(self.text.take(rows), self.image.take(columns), self.text_keep[rows],
                          self.image_keep[columns], self.bias)
        unpaired = Rows(streams.text.bias, self.text.lengths), Rows(streams.image.bias, self.image.lengths)
        if pack:
            streams = streams.without_padding()
        return text, image, streams, Pairs((rows, columns), unpaired, streams.packing)

    def laid_out(self, name: str, *states: Tensor) -> tuple[Tensor, ...]:
        """[B, S, C] tensors of stream "text" or "image" as this layout has them: the same, or [N, C] packed."""
        if self.packing is None:
            return states
        return tuple(_select(x, self.packing[name == "image"]) for x in states)

    def without_padding(self) -> "Streams":
        """The layout of the same streams packed; itself where counts of rows are not known."""
        masked = self.text.bias is not None or self.image.bias is not None or self.bias is not None
        unknown = self.text.lengths is None and self.image.lengths is None
        if self.packing is not None or masked or unknown or torch.compiler.is_compiling():
            return self
        packing, rows = [], []
        for old, keep in ((self.text, self.text_keep), (self.image, self.image_keep)):
            lengths = old.lengths
            if lengths is None:
                lengths = torch.full(keep.shape[:1], keep.shape[1], device=keep.device)
            packing.append(keep.flatten().nonzero()[:, 0])
            offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            rows.append(Rows(lengths=lengths, offsets=offsets))
        return replace(self, text=rows[0], image=rows[1], packing=tuple(packing))

    def padded(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams as [B, S, C]; where counts of rows are known, the rows behind them are 0."""
        states = []
        for i, (x, rows, keep) in enumerate(((text, self.text, self.text_keep), (image, self.image, self.image_keep))):
            if self.packing is not None:
                x = x.new_zeros(keep.numel(), x.shape[-1]).index_copy(0, self.packing[i], x).unflatten(0, keep.shape)
            elif rows.lengths is not None:
                x = x.masked_fill(~keep[..., None], 0)
            states.append(x)
        return tuple(states)

    def mean_text(self, text: Tensor) -> Tensor:
        """Mean state over the tokens that exist, to broadcast against the region stream: [B, 1, C], [N, C], [1, C]."""
        if self.packing is not None:
            owners, counts = self.text.owners(), self.text.lengths
        else:
            owners = torch.arange(len(text), device=text.device).repeat_interleave(text.shape[1])
            counts = self.text_keep.sum(1)
            text = text.masked_fill(~self.text_keep[:, :, None].bool(), 0).flatten(0, 1)
        # row by row, so that neither padding nor packing changes the order of the sum
        total = text.new_zeros(len(counts), text.shape[-1]).index_add(0, owners, text)
        mean = total / counts.clamp(min=1)[:, None]
        if self.packing is None:
            return mean[:, None]
        return mean if len(mean) == 1 else mean[self.image.owners()]


@dataclass(frozen=True)
class Pairs:
    """Which text meets which image while the states still hold every example once.

    Attributes:
        index: [P] texts and [P] images.
        rows: layout of the states; biases are those of the P pairs.
        packing: where the packed rows of the pairs lie among the P * T and P * R padded ones; None: padded.
    """

    index: tuple[Tensor, Tensor]
    rows: tuple[Rows, Rows]
    packing: tuple[Tensor, Tensor] | None = None

    def take(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The states of every pair: [B, S, C] -> [P, S, C] or [N, C]."""
        taken = []
        for x, index, packing in zip((text, image), self.index, self.packing or (None, None), strict=True):
            if packing is None:
                taken.append(x.index_select(0, index))
            else:
                longest = x.shape[1]
                taken.append(_select(x, index[packing // longest] * longest + packing % longest))
        return tuple(taken)

    def packed(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """[P, S, ...] -> [N, ...], unchanged while padded."""
        if self.packing is None:
            return text, image
        return _select(text, self.packing[0]), _select(image, self.packing[1])


def _select(x: Tensor, at: Tensor) -> Tensor:
    """[B, S, ...] -> [N, ...], rows `at` of the B * S."""
    return x.flatten(0, 1).index_select(0, at)


def check_ids(input_ids: Tensor) -> None:
    """Token ids are [B, T] integers; TypeError or ValueError otherwise."""
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids: is {input_ids.dtype}, must be integers")
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids: has shape {list(input_ids.shape)}, must be [B, T] with T > 0")


def check_regions(feat: Tensor, loc: Tensor, widths: tuple[int, int]) -> None:
    """Features [B, R, widths[0]] and boxes [B, R, widths[1]] of the same regions; ValueError otherwise."""
    if feat.ndim != 3 or not feat.shape[1] or feat.shape[2] != widths[0]:
        raise ValueError(f"image_feat: has shape {list(feat.shape)}, must be [B, R, {widths[0]}] with R > 0")
    if loc.shape != (*feat.shape[:2], widths[1]):
        raise ValueError(f"image_loc: has shape {list(loc.shape)}, must be {[*feat.shape[:2], widths[1]]}")


def read_layout(mask_name: str, mask: Tensor | None, lengths_name: str, lengths: Tensor | None,
                shape: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """(mask, lengths) of a [B, S, ...] stream, checked; at most one of them is given."""
    if mask is not None and lengths is not None:
        raise ValueError(f"{lengths_name}: given together with {mask_name}, must be one or the other")
    return as_mask(mask_name, mask, shape), as_lengths(lengths_name, lengths, *shape)


def _rows(mask_name: str, mask: Tensor | None, lengths_name: str, lengths: Tensor | None, x: Tensor,
          dtype: torch.dtype) -> tuple[Rows, Tensor]:
    """The layout of a [B, S, ...] stream, and which of its rows exist [B, S]."""
    batch, longest = x.shape[:2]
    mask, lengths = read_layout(mask_name, mask, lengths_name, lengths, (batch, longest))
    if lengths is not None:
        keep = torch.arange(longest, device=x.device) < lengths[:, None]
    else:
        keep = torch.ones(batch, longest, dtype=torch.bool, device=x.device) if mask is None else mask
    return Rows.of(mask, lengths, dtype), keep


def self_attend(query: Tensor, key: Tensor, value: Tensor, rows: Rows, *, dropout: float = 0.0,
                return_probs: bool = False) -> tuple[Tensor, Tensor | None]:
    """Attention of a stream over itself: ([B, S, H, D] or [N, H, D], probabilities [B, H, S, S] or None)."""
    if rows.offsets is not None:
        return attention_varlen(query, key, value, rows.offsets, dropout=dropout).out, None
    result = attention(query, key, value, lengths=rows.lengths, bias=rows.bias, prefix=rows.prefix, dropout=dropout,
                       return_probs=return_probs)
    return result.out, result.probs


def co_attend(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor], rows_a: Rows, rows_b: Rows, *,
              bias: Tensor | None = None, dropout_a: float = 0.0, dropout_b: float = 0.0, return_probs: bool = False,
              pairs: Pairs | None = None):
    """Both directions of attention between streams a and b.

    Args:
        a, b: (query, key, value) of each stream, [B, Sa, H, D] and [B, Sb, H, D], or [Na, H, D] and [Nb, H, D].
        bias: [B, 1, Sa, Sb] added to the scores of both directions, or None.
        dropout_a, dropout_b: of the queries of a over the keys of b, and the other way round.
        pairs: which a meets which b, read by index; rows_a and rows_b are then those of the result.

    Returns:
        (context of a, context of b, probabilities a over b [B, H, Sa, Sb] or None, probabilities b over a or None).
    """
    index = None, None
    if pairs is not None:
        (rows_a, rows_b), index = pairs.rows, pairs.index
    if rows_a.offsets is not None:
        result = co_attention_varlen(*a, *b, rows_a.offsets, rows_b.offsets, dropout_a=dropout_a, dropout_b=dropout_b)
        return result.out_a, result.out_b, None, None
    bias_a, bias_b = rows_b.bias, rows_a.bias
    if bias is not None:
        turned = bias.transpose(-1, -2)
        bias_a = bias if bias_a is None else bias_a + bias
        bias_b = turned if bias_b is None else bias_b + turned
    result = co_attention(*a, *b, lengths_a=rows_a.lengths, lengths_b=rows_b.lengths, bias_a=bias_a, bias_b=bias_b,
                          dropout_a=dropout_a, dropout_b=dropout_b, return_probs=return_probs, pair_a=index[0],
                          pair_b=index[1])
    contexts = result.out_a, result.out_b
    return *(contexts if pairs is None else pairs.packed(*contexts)), result.probs_a, result.probs_b
