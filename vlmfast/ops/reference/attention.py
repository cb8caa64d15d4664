r"""Definitions of the `attention` family in plain PyTorch.

`forward` and `backward` are one direction of attention, the primitives that a backend provides; every other op is
two of them, or is written out below in terms of `attend`. Layout: query [B, Sq, H, D], key [B, Sk, H, D],
value [B, Sk, H, Dv], or packed [N, H, D] with `cu_q` and `cu_k`.

.. math:: x = s\,q k^\top + b, \quad p = \mathrm{softmax}_{live}(x), \quad o = \tilde p v,
          \quad \tilde p = p \odot keep / (1 - rate)

A pair of a query and a key is live unless a length, a mask, causality or a bias of -inf excludes it. Only live pairs
are ever multiplied: what stands in an excluded key or value never reaches a result. A query without live keys has
output 0, log-sum-exp -inf and gradient 0.

    dp~ = do v^T,  dp = dp~ keep / (1 - rate) + dprobs,  dx = p (dp - sum(p dp) + dlse),
    dq = s dx k,  dk = s dx^T q,  dv = p~^T do,  db = dx summed to the shape of b
"""

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter, key, rounds: int = PHILOX_ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four counter words and two key words (int64 tensors below 2^32) -> four random words.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    def multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
        # the 64-bit product in halves, since int64 is signed
        low, high = constant & 0xFFFF, constant >> 16
        middle = x * high + ((x * low) >> 16)
        return middle >> 16, (x * constant) & _WORD

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_mask(seed, batch: int, heads: int, sq: int, sk: int, p: float, direction: int = 0,
                 device=None) -> Tensor:
    """[batch, heads, sq, sk] bool, True where a probability is kept.

    Counter (b heads + h, direction, row, column / 4), word column % 4; kept if the word is at least p 2^32.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    device = seed.device

    def count(n, *shape):
        return torch.arange(n, dtype=torch.int64, device=device).view(shape)

    unit = count(batch * heads, batch, heads, 1, 1)
    row, group = count(sq, 1, 1, sq, 1), count((sk + 3) // 4, 1, 1, 1, (sk + 3) // 4)
    counter = torch.broadcast_tensors(unit & _WORD, torch.full_like(unit, direction), row, group)
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), -1)
    return words.flatten(-2)[..., :sk] >= int(p * 2**32)


def live_pairs(batch: int, sq: int, sk: int, device, *, lengths_q=None, lengths_k=None, key_mask=None, mask=None,
               bias=None, prefix=None, causal: bool = False) -> Tensor | None:
    """Bool, broadcastable to [batch, heads, sq, sk], True where query and key meet; None if all do."""
    row = torch.arange(sq, device=device)[:, None]
    column = torch.arange(sk, device=device)
    parts = []
    if lengths_q is not None:
        parts.append(row < lengths_q[:, None, None, None])
    if lengths_k is not None:
        parts.append(column < lengths_k[:, None, None, None])
    if key_mask is not None:
        parts.append(key_mask[:, None, None, :])
    if mask is not None:
        parts.append(mask)
    if bias is not None:
        parts.append(bias != -torch.inf)
    if causal:
        # the last query sees the last key: with a cache of keys the queries are the newest positions
        count_q = sq if lengths_q is None else lengths_q[:, None, None, None]
        count_k = sk if lengths_k is None else lengths_k[:, None, None, None]
        visible = column <= row + (count_k - count_q)
        parts.append(visible if prefix is None else visible | (column < prefix[:, None, None, None]))
    if not parts:
        return None
    live = parts[0]
    for part in parts[1:]:
        live = live & part
    return live


def softmax(x: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores -> (probabilities, log-sum-exp) over the live pairs of the last dimension."""
    if live is not None:
        x = x.masked_fill(~live, -torch.inf)
    if x.shape[-1] == 0:
        return x, x.new_full(x.shape[:-1], -torch.inf)
    top = x.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    e = (x - top).exp()
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return e / total, (total.log() + top).masked_fill(empty, -torch.inf).squeeze(-1)


def live_product(weight: Tensor, live: Tensor | None, rows: Tensor) -> Tensor:
    """weight [.., M, N] @ rows [.., N, D], where only live pairs (M, N) are multiplied."""
    if live is None:
        return weight @ rows
    finite = rows.isfinite()
    total = weight @ rows.masked_fill(~finite, 0.0)
    live = live.to(rows.dtype).expand(*live.shape[:-2], *weight.shape[-2:])
    return total.masked_fill(live @ (~finite).to(rows.dtype) > 0, torch.nan)


def attend(query, key, value, *, live=None, bias=None, scale: float, keep=None, dropout: float = 0.0):
    """query, key, value [B, H, S, D] -> (out, p, p~, lse), differentiable by autograd where all pairs are finite."""
    x = scale * (query @ key.transpose(-1, -2))
    if bias is not None:
        x = x + bias
    p, lse = softmax(x, live)
    dropped = p if keep is None else p.masked_fill(~keep, 0.0) * _gain(dropout)
    return live_product(dropped, live, value), p, dropped, lse


def _gain(dropout: float) -> float:
    return 1 / (1 - dropout) if dropout < 1 else 0.0


def pad_packed(x: Tensor, cu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, ...] and offsets [B + 1] -> ([B, S, ...] with zeros behind each sequence, its rows [n], lengths [B])."""
    lengths = cu.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    at = torch.arange(longest, device=x.device)
    valid = at < lengths[:, None]
    rows = (cu[:-1, None] + at)[valid]
    out = x.new_zeros(*valid.shape, *x.shape[1:])
    out[valid] = x[rows]
    return out, rows, lengths


def unpad(x: Tensor, rows: Tensor, lengths: Tensor, count: int) -> Tensor:
    """[B, S, ...] -> [count, ...], zeros in the rows that belong to no sequence."""
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    out = x.new_zeros(count, *x.shape[2:])
    out[rows] = x[valid]
    return out


def _state(query, key, value, *, lengths_q=None, lengths_k=None, key_mask=None, mask=None, bias=None, prefix=None,
           pair_q=None, pair_k=None, seed=None, scale: float = 1.0, causal: bool = False, dropout: float = 0.0,
           direction: int = 0):
    """Everything `forward` and `backward` need, in [B, H, S, D] and float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if pair_q is not None:
        query = query[pair_q]
        lengths_q = None if lengths_q is None else lengths_q[pair_q]
    if pair_k is not None:
        key, value = key[pair_k], value[pair_k]
        lengths_k = None if lengths_k is None else lengths_k[pair_k]
        key_mask = None if key_mask is None else key_mask[pair_k]
    query, key, value = (x.transpose(1, 2).to(wide) for x in (query, key, value))
    bias = None if bias is None else bias.to(wide)
    live = live_pairs(query.shape[0], query.shape[2], key.shape[2], query.device, lengths_q=lengths_q,
                      lengths_k=lengths_k, key_mask=key_mask, mask=mask, bias=bias, prefix=prefix, causal=causal)
    keep = None
    if dropout:
        keep = dropout_mask(seed, *query.shape[:3], key.shape[2], dropout, direction)
    out, p, dropped, lse = attend(query, key, value, live=live, bias=bias, scale=scale, keep=keep, dropout=dropout)
    return query, key, value, live, keep, out, p, dropped, lse


def _unpacked(query, key, value, cu_q, cu_k, options):
    """The same call on padded tensors: (query, key, value, options, rows and lengths of both streams)."""
    options = dict(options)
    q, rows_q, lengths_q = pad_packed(query, cu_q)
    k, rows_k, lengths_k = pad_packed(key, cu_k)
    v = pad_packed(value, cu_k)[0]
    if options.get("key_mask") is not None:
        options["key_mask"] = pad_packed(options["key_mask"], cu_k)[0]
    options.update(lengths_q=lengths_q, lengths_k=lengths_k)
    return q, k, v, options, (rows_q, lengths_q), (rows_k, lengths_k)


def forward(query, key, value, *, cu_q=None, cu_k=None, probs_dropout: bool = False, **options):
    """One direction: (out like query with width Dv, probs [B, H, Sq, Sk], lse [B, H, Sq]).

    Options, all of them None or off by default: lengths_q, lengths_k [B]; key_mask bool [B, Sk]; mask bool and bias,
    broadcastable to [B, H, Sq, Sk]; causal, and prefix [B] (keys that every query sees); pair_q, pair_k [P], which
    make P sequences of rows of the given ones; dropout with seed [] and direction; scale. Lengths and key_mask belong
    to the unpaired streams, mask, bias and prefix to the pairs. Packed inputs: lse is [N, H], probs are None.
    """
    if cu_q is not None:
        q, k, v, options, (rows, lengths), _ = _unpacked(query, key, value, cu_q, cu_k, options)
        out, _, lse = forward(q, k, v, **options)
        lse_rows = lse.new_full((len(query), lse.shape[1]), -torch.inf)
        valid = torch.arange(q.shape[1], device=q.device) < lengths[:, None]
        lse_rows[rows] = lse.transpose(1, 2)[valid]
        return unpad(out, rows, lengths, len(query)), None, lse_rows
    *_, out, p, dropped, lse = _state(query, key, value, **options)
    dtype = query.dtype
    return out.transpose(1, 2).contiguous().to(dtype), (dropped if probs_dropout else p).to(dtype), lse


def backward(d_out, d_probs, d_lse, query, key, value, *, cu_q=None, cu_k=None, probs_dropout: bool = False, **options):
    """(d_query, d_key, d_value, d_bias or None); d_probs and d_lse may be None."""
    if cu_q is not None:
        q, k, v, options, (rows_q, lengths_q), (rows_k, lengths_k) = _unpacked(query, key, value, cu_q, cu_k, options)
        d_lse = None if d_lse is None else pad_packed(d_lse, cu_q)[0].transpose(1, 2)
        d_query, d_key, d_value, d_bias = backward(pad_packed(d_out, cu_q)[0], None, d_lse, q, k, v, **options)
        return (unpad(d_query, rows_q, lengths_q, len(query)), unpad(d_key, rows_k, lengths_k, len(key)),
                unpad(d_value, rows_k, lengths_k, len(value)), d_bias)
    q, k, v, live, keep, _, p, dropped, _ = _state(query, key, value, **options)
    dropout, scale, bias = options.get("dropout", 0.0), options.get("scale", 1.0), options.get("bias")
    flipped = None if live is None else live.transpose(-1, -2)
    do = d_out.transpose(1, 2).to(q.dtype)
    dp = do @ v.transpose(-1, -2)
    if d_probs is not None and probs_dropout:
        dp = dp + d_probs.to(dp.dtype)
    if keep is not None:
        dp = dp.masked_fill(~keep, 0.0) * _gain(dropout)
    if d_probs is not None and not probs_dropout:
        dp = dp + d_probs.to(dp.dtype)
    if live is not None:
        dp = dp.masked_fill(~live, 0.0)
    inner = (p * dp).sum(-1, keepdim=True)
    dx = p * (dp - (inner if d_lse is None else inner - d_lse.to(dp.dtype)[..., None]))
    if live is not None:
        dx = dx.masked_fill(~live, 0.0)
    d_query = scale * live_product(dx, live, k)
    d_key = scale * live_product(dx.transpose(-1, -2), flipped, q)
    d_value = live_product(dropped.transpose(-1, -2), flipped, do)
    d_bias = None if bias is None else dx.sum_to_size(bias.shape).to(bias.dtype)
    pairs = options.get("pair_q"), options.get("pair_k"), options.get("pair_k")
    results = []
    for gradient, like, pair in zip((d_query, d_key, d_value), (query, key, value), pairs, strict=True):
        gradient = gradient.transpose(1, 2)
        if pair is not None:
            gradient = gradient.new_zeros(like.shape).index_add_(0, pair, gradient)
        results.append(gradient.to(like.dtype).contiguous())
    return *results, d_bias


def bi_attention(query_b, key_a, value_a, value_b, *, live_a=None, live_b=None, bias=None, scale: float,
                 dropout_a: float = 0.0, dropout_b: float = 0.0, seed=None):
    """One score matrix x = s query_b key_a^T: out_b = softmax_a(x) value_a, out_a = softmax_b(x^T) value_b.

    live_a bool [B, Sa] and live_b [B, Sb]. Returns (out_a, out_b, probs_a, probs_b, lse_a, lse_b); plain autograd.
    Source: GLIP (Li et al. 2022, arXiv:2112.03857), eq. 4-6.
    """
    wide, dtype = torch.promote_types(query_b.dtype, torch.float32), query_b.dtype
    live = None
    if live_a is not None or live_b is not None:
        everything = torch.ones((), dtype=torch.bool, device=query_b.device)
        live = (everything if live_a is None else live_a[:, None, None, :]) \
            & (everything if live_b is None else live_b[:, None, :, None])
        # rows that nobody may see must not be multiplied, not even by a gradient of 0
        if live_a is not None:
            key_a, value_a = (x.masked_fill(~live_a[:, :, None, None], 0.0) for x in (key_a, value_a))
        if live_b is not None:
            query_b, value_b = (x.masked_fill(~live_b[:, :, None, None], 0.0) for x in (query_b, value_b))
    query_b, key_a, value_a, value_b = (x.transpose(1, 2).to(wide) for x in (query_b, key_a, value_a, value_b))
    x = scale * (query_b @ key_a.transpose(-1, -2))
    if bias is not None:
        x = x + bias.to(wide)
        live = bias != -torch.inf if live is None else live & (bias != -torch.inf)
    outs, probs, lses = [], [], []
    for direction, (scores, value, rate) in enumerate(((x.transpose(-1, -2), value_b, dropout_a),
                                                       (x, value_a, dropout_b))):
        seen = live if live is None or direction else live.transpose(-1, -2)
        p, lse = softmax(scores, seen)
        dropped = p
        if rate:
            keep = dropout_mask(seed, *p.shape, rate, direction)
            dropped = p.masked_fill(~keep, 0.0) * _gain(rate)
        outs.append((dropped @ value).transpose(1, 2).to(dtype))
        probs.append(p.to(dtype))
        lses.append(lse)
    return (*outs, *probs, *lses)


def window_index(size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...],
                 device=None) -> tuple[Tensor, Tensor]:
    """(rows [windows, N], regions [windows, N]): which position of the grid each place of each window holds after the
    cyclic shift, and which part of the unshifted grid it belongs to; only equal regions attend to each other."""
    axes, regions = [], []
    for length, width, step in zip(size, window, shift, strict=True):
        at = torch.arange(length, device=device)
        axes.append((at + step) % length)
        # the last window holds the tail of the axis and, behind it, what was rolled round from its start
        regions.append((at >= length - width).long() + (at >= length - step).long() if step else torch.zeros_like(at))
    rows, region = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    for axis, (length, part) in enumerate(zip(size, regions, strict=True)):
        shape = [1] * len(size)
        shape[axis] = length
        rows = rows * length + axes[axis].view(shape)
        region = region * 3 + part.view(shape)
    return _windows(rows.expand(size), window), _windows(region.expand(size), window)


def _windows(grid: Tensor, window: tuple[int, ...]) -> Tensor:
    split = [part for length, width in zip(grid.shape, window, strict=True) for part in (length // width, width)]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    count = 1
    for width in window:
        count *= width
    return grid.reshape(split).permute(order).reshape(-1, count)


def relative_index(window: tuple[int, ...], device=None) -> Tensor:
    """[N, N] row of the relative position table for query i and key j: offsets are mixed radix, 2 w - 1 an axis."""
    grid = torch.meshgrid(*(torch.arange(width, device=device) for width in window), indexing="ij")
    index = torch.zeros((), dtype=torch.int64, device=device)
    for axis, width in zip(grid, window, strict=True):
        at = axis.flatten()
        index = index * (2 * width - 1) + (at[:, None] - at[None, :] + width - 1)
    return index


def window_attention(qkv, bias, *, window, shift, scale: float, dropout: float = 0.0, seed=None):
    """qkv [B, *size, 3, H, D], bias [H, N, N] or None -> [B, *size, H, D]; plain autograd.

    Source: Swin (Liu et al. 2021, arXiv:2103.14030), eq. 4 and Fig. 4; Video Swin (arXiv:2106.13230) for three axes.
    """
    size, dtype = qkv.shape[1:-3], qkv.dtype
    rows, regions = window_index(tuple(size), window, shift, qkv.device)
    tokens = qkv.flatten(1, len(size)).to(torch.promote_types(dtype, torch.float32))
    # [B windows, 3, H, N, D]
    parts = tokens[:, rows].flatten(0, 1).permute(0, 2, 3, 1, 4)
    live = None
    if any(shift):
        live = (regions[:, :, None] == regions[:, None, :])[:, None].repeat(qkv.shape[0], 1, 1, 1)
    keep = dropout_mask(seed, parts.shape[0], parts.shape[2], *rows.shape[1:] * 2, dropout) if dropout else None
    out = attend(*parts.unbind(1), live=live, bias=bias, scale=scale, keep=keep, dropout=dropout)[0]
    out = out.transpose(1, 2).reshape(qkv.shape[0], rows.numel(), *qkv.shape[-2:])
    result = torch.zeros_like(out).index_copy(1, rows.flatten(), out)
    return result.view(qkv.shape[0], *size, *qkv.shape[-2:]).to(dtype)


def axial_mask(text_len: int, grid: tuple[int, int], mode: str, kernel: int = 11, device=None) -> Tensor:
    """[L, L] bool with L = text_len + height width, True where query (row) sees key (column).

    Text sees text causally; every image position sees all text. Image positions see, of the image, up to themselves:
    "row" the last `width` positions before them (so down to the same column of the row above), "col" their own column,
    "conv" a square of `kernel` columns centred on theirs over their own row and the (kernel - 1) / 2 rows above,
    "row_only" their own row, "corner" the square of `kernel` rows and columns up and left of them, "full" everything.

    Source: DALL-E (Ramesh et al. 2021, arXiv:2102.12092), Fig. 11; "row_only" and "corner" are the variants of
    the open implementation DALLE-pytorch.
    """
    height, width = grid
    at = torch.arange(height * width, device=device)
    y, x = at // width, at % width
    down, right, back = y[:, None] - y, x[:, None] - x, at[:, None] - at
    seen = back >= 0
    if mode == "row":
        seen = seen & (back <= width)
    elif mode == "row_only":
        seen = seen & (down == 0)
    elif mode == "col":
        seen = seen & (right == 0)
    elif mode == "conv":
        seen = seen & (down <= kernel // 2) & (right.abs() <= kernel // 2)
    elif mode == "corner":
        seen = seen & (down < kernel) & (right >= 0) & (right < kernel)
    length = text_len + height * width
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[text_len:, text_len:] = seen
    return mask


def axial_attention(query, key, value, *, text_len: int, grid, mode: str, kernel: int = 11, scale: float,
                    dropout: float = 0.0, seed=None):
    """query, key, value [B, L, H, D] -> [B, L, H, Dv] under `axial_mask`; plain autograd."""
    dtype = query.dtype
    q, k, v = (x.transpose(1, 2).to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    live = axial_mask(text_len, grid, mode, kernel, query.device)
    keep = dropout_mask(seed, *q.shape[:3], k.shape[2], dropout) if dropout else None
    return attend(q, k, v, live=live, scale=scale, keep=keep, dropout=dropout)[0].transpose(1, 2).to(dtype)
