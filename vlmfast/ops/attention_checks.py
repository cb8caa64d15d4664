"""The attention ops' checks at the door: each raises naming the argument, what it was and what it must be."""

import math

import torch
from torch import Tensor

from .attention_native import DTYPES


def check_streams(op: str, names: tuple[str, ...], tensors: tuple[Tensor, ...], rank: int = 4) -> tuple[Tensor, ...]:
    """Same dtype, device and rank for all; the last dimension contiguous."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return _streams_in_detail(op, names, tensors, rank)
    dtype, device = first.dtype, first.device
    for x in tensors:
        if not (isinstance(x, Tensor) and x.dtype is dtype and x.ndim == rank and x.device == device
                and (x.stride(-1) == 1 or x.shape[-1] <= 1)):
            return _streams_in_detail(op, names, tensors, rank)
    if dtype not in DTYPES:
        raise TypeError(f"{op}: {names[0]} is {dtype}, it must be float32, float64, bfloat16 or float16")
    return tensors


def _streams_in_detail(op: str, names: tuple[str, ...], tensors: tuple[Tensor, ...], rank: int) -> tuple[Tensor, ...]:
    layout = {3: "[N, H, D]", 4: "[B, S, H, D]"}.get(rank, f"of {rank} dimensions")
    first = tensors[0]
    for name, x in zip(names, tensors, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is a {type(x).__name__}, it must be a tensor")
        if x.ndim != rank:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be {layout}")
        if x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device}, {names[0]} on {first.device}; they must be equal")
        if x.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} is {x.dtype}, it must be float32, float64, bfloat16 or float16")
        if x.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
            raise ValueError(f"{op}: {name} is {x.dtype}, {names[0]} is {first.dtype}; they must be equal")
    dtype = first.dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    tensors = tuple(x.to(dtype) for x in tensors)
    return tuple(x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in tensors)


def check_match(op: str, names: tuple[str, str, str], query: Tensor, key: Tensor, value: Tensor, paired: bool) -> None:
    q, k, v = names
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"{op}: {v} has shape {tuple(value.shape)}, {k} has {tuple(key.shape)}; they must agree but "
                         "for the last dimension")
    if query.shape[-2:] != key.shape[-2:]:
        raise ValueError(f"{op}: {k} has heads and width {tuple(key.shape[-2:])}, {q} has {tuple(query.shape[-2:])}; "
                         "they must be equal")
    if query.ndim == 4 and not paired and query.shape[0] != key.shape[0]:
        raise ValueError(f"{op}: {k} has batch {key.shape[0]}, {q} has {query.shape[0]}; they must be equal without "
                         "pair indices")


def check_integers(op: str, name: str, x, like: Tensor, count: int | None) -> Tensor | None:
    """int32 or int64 [count] -> int64, contiguous."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be an int32 or int64 tensor")
    if x.ndim != 1 or count is not None and x.shape[0] != count:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be [{'P' if count is None else count}]")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on {like.device}")
    return x.long().contiguous()


def check_mask(op: str, name: str, x, like: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be a bool tensor, True where a key is kept")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on {like.device}")


def check_key_mask(op: str, name: str, x, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    if x is None:
        return None
    check_mask(op, name, x, like)
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be {list(shape)}")
    return x


def check_broadcast(op: str, name: str, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """x with as many dimensions as `shape`, each of them equal or 1."""
    full = x.view((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
    if full.ndim != 4 or any(have not in (1, want) for have, want in zip(full.shape, shape, strict=True)):
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must broadcast to {list(shape)} "
                         "(sequences, heads, queries, keys)")
    return full


def check_bias(op: str, name: str, x, like: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be a floating-point tensor that is added to the scores")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on {like.device}")
    return check_broadcast(op, name, x, shape)


def check_rate(op: str, name: str, rate) -> float:
    if not 0 <= rate <= 1:
        raise ValueError(f"{op}: {name} is {rate}, it must lie between 0 and 1")
    return float(rate)


def check_scale(op: str, scale, width: int) -> float:
    if scale is None:
        return 1 / math.sqrt(width) if width else 1.0
    if isinstance(scale, Tensor):
        raise TypeError(f"{op}: scale is a tensor, it must be a number; multiply the queries to learn it")
    if math.isnan(scale):
        raise ValueError(f"{op}: scale is NaN, it must be a number")
    return float(scale)


def draw_seed(op: str, seed, like: Tensor, needed: bool) -> Tensor | None:
    """The [] int64 seed tensor: the given one, or one draw from torch's generator of the device."""
    if not needed:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed is {tuple(seed.shape)} {seed.dtype}, it must be one int64")
        return seed.reshape(()).to(like.device)
    if not -2**63 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, it must fit in 64 bits with its sign")
    # filled on the device, so that a CUDA graph can be captured
    return torch.full((), seed, dtype=torch.int64, device=like.device)
