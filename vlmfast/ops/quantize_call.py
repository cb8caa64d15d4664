"""The quantize family's primitives as ops of torch.library, and their calls into the backends.

What is not wanted comes back empty.
"""

import torch
from torch import Tensor

from .. import _native
from . import dispatch
from .attention_native import DTYPES, address


def native_grid(x: Tensor | None):
    if x is None:
        return _native.Grid(0, 0, 0, 0, 0)
    strides = x.stride()
    # a single position or entry has any stride; the kernel asks which of the two is 1
    position = 1 if x.shape[1] == 1 and strides[2] != 1 else strides[1]
    return _native.Grid(x.data_ptr(), DTYPES[x.dtype], strides[0], position, strides[2])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _reference_noise(grid: Tensor, given: Tensor | None, seed: Tensor | None) -> Tensor | None:
    from .reference import quantize as reference

    if given is not None:
        return given.flatten(0, 1)
    if seed is None:
        return None
    return reference.gumbel_noise(grid.shape[0] * grid.shape[1], grid.shape[2], seed)


def _native_call(grid, codebook, given, seed, tau, z, indices, lse, plain, expected):
    sizes = [*grid.shape, codebook.shape[1]]
    number = 0 if seed is None else int(seed) & (2**64 - 1)
    return _native.Quantize(sizes, native_grid(grid), native_grid(given), seed is not None, number, 0,
                            codebook.data_ptr(), tau, torch.get_num_threads(), *map(address, (z, indices, lse, plain,
                                                                                            expected)))


def _fwd(grid, codebook, given, seed, tau, want_z, want_kl, want_lse):
    wide, count = _wide(grid), grid.shape[0] * grid.shape[1]
    backend = dispatch.choose("quantize", grid)
    if backend == "native":
        z, indices, lse, plain, expected = _empty(grid, codebook, want_z, want_kl, want_lse)
        codes = codebook.to(wide).contiguous()
        if count:
            some = [x if x.numel() else None for x in (z, indices, lse, plain, expected)]
            _native.quantize_fwd(_native_call(grid, codes, given, seed, tau, *some))
        return z, indices, lse, plain, expected
    if backend == "triton":
        kernels = dispatch.module("quantize", "triton")
        return kernels.forward(grid, codebook, given, seed, tau, want_z, want_kl, want_lse)
    with torch.autocast(grid.device.type, enabled=False):
        found = dispatch.module("quantize", "reference").forward(
            grid.flatten(0, 1), codebook, _reference_noise(grid, given, seed), tau, want_z, want_kl)
    z, indices, lse, plain, expected = found
    return tuple(grid.new_empty(0, dtype=wide) if x is None else x
                 for x in (z, indices, lse if want_lse else None, plain, expected))


def _empty(grid, codebook, want_z, want_kl, want_lse):
    wide, count = _wide(grid), grid.shape[0] * grid.shape[1]
    shapes = (count, codebook.shape[1]) if want_z else 0, count if want_lse else 0, *(count if want_kl else 0,) * 2
    z, lse, plain, expected = (grid.new_empty(shape, dtype=wide) for shape in shapes)
    return z, grid.new_empty(count, dtype=torch.int64), lse, plain, expected


def _bwd(grid, codebook, given, seed, tau, d_z, gain, lse, mean_code, plain, expected, kl, plain_gain, plain_code,
         indices, want_logits, want_codebook):
    wide = _wide(grid)
    backend = dispatch.choose("quantize", grid)
    arguments = (grid, codebook, given, seed, tau, d_z, gain, lse, mean_code, plain, expected, kl, plain_gain,
                 plain_code, indices, want_logits, want_codebook)
    if backend == "triton":
        return dispatch.module("quantize", "triton").backward(*arguments)
    if backend == "native":
        d_logits = torch.empty_like(grid) if want_logits else grid.new_empty(0)
        if want_logits and 1 not in d_logits.stride()[1:]:
            d_logits = torch.empty(grid.shape, dtype=grid.dtype)
        d_codebook = grid.new_empty(codebook.shape if want_codebook else 0, dtype=wide)
        codes = codebook.to(wide).contiguous()
        mean_code, plain_code = (None if x is None else x.contiguous() for x in (mean_code, plain_code))
        plain, expected = (x if x is not None and x.numel() else None for x in (plain, expected))
        call = _native_call(grid, codes, given, seed, tau, None, indices, lse, plain, expected)
        _native.quantize_bwd(call, *map(address, (d_z, mean_code, plain_code)), gain, 0.0 if kl is None else float(kl),
                             plain_gain, native_grid(d_logits if want_logits else None),
                             d_codebook.data_ptr() if want_codebook else 0)
        return d_logits, d_codebook
    if d_z is None:
        d_z = codebook.new_zeros(lse.shape[0], codebook.shape[1])
    with torch.autocast(grid.device.type, enabled=False):
        d_logits, d_codebook = dispatch.module("quantize", "reference").backward(
            grid.flatten(0, 1), codebook, _reference_noise(grid, given, seed), tau, d_z, gain, lse,
            plain if plain is not None and plain.numel() else None, expected, 0.0 if kl is None else kl, plain_gain,
            indices, want_codebook)
    return d_logits.view(grid.shape) if want_logits else grid.new_empty(0), \
        grid.new_empty(0, dtype=wide) if d_codebook is None else d_codebook


def _bwd_fake(grid, codebook, given, seed, tau, d_z, gain, lse, mean_code, plain, expected, kl, plain_gain, plain_code,
              indices, want_logits, want_codebook):
    return torch.empty_like(grid) if want_logits else grid.new_empty(0), \
        grid.new_empty(codebook.shape if want_codebook else 0, dtype=_wide(grid))


def _encode(grid, weight, bias):
    wide = _wide(grid)
    if dispatch.choose("quantize", grid) == "native":
        indices = grid.new_empty(grid.shape[0] * grid.shape[1], dtype=torch.int64)
        weight = weight.to(wide).contiguous()
        bias = None if bias is None else bias.to(wide).contiguous()
        if indices.numel():
            _native.encode_indices([*grid.shape[:2], *weight.shape], native_grid(grid), weight.data_ptr(),
                                   address(bias), wide == torch.float64, indices.data_ptr(), torch.get_num_threads())
        return indices
    return dispatch.module("quantize", "reference").encode_indices(grid.flatten(0, 1), weight, bias)


def _encode_fake(grid, weight, bias):
    return grid.new_empty(grid.shape[0] * grid.shape[1], dtype=torch.int64)


def _fwd_fake(grid, codebook, given, seed, tau, want_z, want_kl, want_lse):
    return _empty(grid, codebook, want_z, want_kl, want_lse)


_library = torch.library.Library("vlmfast", "FRAGMENT")
_ARGUMENTS = "Tensor grid, Tensor codebook, Tensor? given, Tensor? seed, float tau, "
_library.define("quantize_fwd(" + _ARGUMENTS + "bool want_z, bool want_kl, bool want_lse) -> "
                "(Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define("quantize_bwd(" + _ARGUMENTS + "Tensor? d_z, float gain, Tensor lse, Tensor? mean_code, Tensor? plain, "
                "Tensor? expected, Tensor? kl, float plain_gain, Tensor? plain_code, Tensor? indices, "
                "bool want_logits, bool want_codebook) -> (Tensor, Tensor)")
_library.define("encode_indices(Tensor grid, Tensor weight, Tensor? bias) -> Tensor")
for _name, _implementation, _fake in (("quantize_fwd", _fwd, _fwd_fake), ("quantize_bwd", _bwd, _bwd_fake),
                                      ("encode_indices", _encode, _encode_fake)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlmfast::{_name}", _fake, lib=_library)
quantize_fwd, quantize_bwd = torch.ops.vlmfast.quantize_fwd.default, torch.ops.vlmfast.quantize_bwd.default
encode = torch.ops.vlmfast.encode_indices.default
