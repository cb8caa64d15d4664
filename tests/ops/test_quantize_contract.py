"""Registration, compilation, instruction sets and refusals of the quantize family."""

import pytest
import torch
from instruction_sets import assert_agree
from quantize_helpers import MODES, case

from vlmfast.ops import encode_indices, gumbel_noise, gumbel_quantize, vector_quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
def test_opcheck(dtype, layout):
    logits, codebook, noise = case((2, 37, 3, 4, 6), dtype, layout)
    grid = logits.flatten(2).transpose(1, 2) if layout == "nchw" else logits
    wide = torch.promote_types(dtype, torch.float32)
    ops, seed, count = torch.ops.vlmfast, torch.tensor(3), grid.shape[0] * grid.shape[1]
    given = (noise.flatten(2).transpose(1, 2) if layout == "nchw" else noise).to(wide)
    for source in ((None, seed), (given, None), (None, None)):
        arguments = grid, codebook, *source, 0.7
        for wanted in ((True, True, True), (False, False, False)):
            torch.library.opcheck(ops.quantize_fwd.default, (*arguments, *wanted))
        z, indices, lse, plain, expected = ops.quantize_fwd(*arguments, True, True, True)
        kl, d_z = torch.tensor(0.3, dtype=wide), torch.randn(z.shape, dtype=wide)
        for rest in ((kl, 0.0, None, None, True, True), (kl, 0.5, z, indices, True, False)):
            torch.library.opcheck(ops.quantize_bwd.default, (*arguments, d_z, 1.4, lse, z, plain, expected, *rest))
    torch.library.opcheck(ops.encode_indices.default, (grid, torch.randn(9, 37, dtype=dtype),
                                                       torch.randn(9, dtype=dtype)))
    assert count == len(indices)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph(mode):
    logits, codebook, _ = (x.requires_grad_() for x in case((2, 37, 4, 5, 6)))

    def step(x, c):
        found = gumbel_quantize(x * 1.0, c, mode=mode, tau=0.8, kl_weight=0.2, seed=3)
        return found.z.square().sum() + found.kl + found.indices.sum() * 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, ours = step(logits, codebook), compiled(logits, codebook)
    assert abs(plain - ours) < 1e-5 * abs(plain)
    for a, b in zip(torch.autograd.grad(plain, (logits, codebook)), torch.autograd.grad(ours, (logits, codebook)),
                    strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.slow
def test_compiled_draws_follow_the_generator():
    logits, codebook, _ = case((1, 40, 3, 3, 5))
    compiled = torch.compile(lambda x, c: gumbel_quantize(x, c).z, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    first, second = compiled(logits, codebook), compiled(logits, codebook)
    torch.manual_seed(2)
    assert torch.equal(first, compiled(logits, codebook)) and not torch.equal(first, second)


@pytest.mark.slow
def test_nearest_codes_compile_to_one_graph():
    x, codebook, weight = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(9, 6, requires_grad=True), \
        torch.randn(7, 6, 1, 1)

    def step(x, c):
        found = vector_quantize(x, c)
        return found.z.sin().sum() + found.loss + encode_indices(found.z, weight).sum()

    plain, ours = step(x, codebook), torch.compile(step, fullgraph=True, backend="aot_eager")(x, codebook)
    assert abs(plain - ours) < 1e-5 * abs(plain)
    for a, b in zip(torch.autograd.grad(plain, (x, codebook)), torch.autograd.grad(ours, (x, codebook)), strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_repeats_the_noise(mode):
    from torch.utils.checkpoint import checkpoint

    logits, codebook, _ = (x.requires_grad_() for x in case((1, 50, 3, 4, 6)))

    def step(x, c):
        found = gumbel_quantize(x, c, mode=mode, kl_weight=0.1)
        return found.z.square().sum() + found.kl

    torch.manual_seed(1)
    plain = torch.autograd.grad(step(logits, codebook), (logits, codebook))
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(step, logits, codebook, use_reentrant=False), (logits, codebook))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_is_refused(mode):
    logits, codebook, _ = (x.requires_grad_() for x in case((1, 20, 2, 2, 3)))
    found = gumbel_quantize(logits, codebook, mode=mode, kl_weight=0.1)
    gradients = torch.autograd.grad(found.z.square().sum() + found.kl, (logits, codebook), create_graph=True)
    with pytest.raises(RuntimeError, match="gumbel_quantize: the second derivative is not implemented"):
        sum(g.square().sum() for g in gradients).backward()


def test_autocast_takes_the_logits_type():
    logits, codebook, _ = case((1, 20, 3, 3, 4))
    codebook.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gumbel_quantize(logits.bfloat16(), codebook, seed=1, kl_weight=1.0)
        nearest = vector_quantize(torch.randn(1, 4, 3, 3, dtype=torch.bfloat16), codebook)
    assert found.z.dtype == torch.bfloat16 and found.kl.dtype == torch.float32
    assert torch.equal(found.z, gumbel_quantize(logits.bfloat16(), codebook.bfloat16(), seed=1).z)
    assert nearest.z.dtype == nearest.loss.dtype == torch.float32
    (found.z.float().sum() + nearest.loss).backward()
    assert codebook.grad.dtype == torch.float32 and codebook.grad.any()


ISA_SCRIPT = """
import torch, vlmfast._native
from vlmfast.ops import encode_indices, gumbel_noise, gumbel_quantize
torch.manual_seed(3)
numbers = [gumbel_noise((33, 70), 5).double().norm()]
for layout, shape in (("nchw", (2, 150, 5, 7)), ("nlc", (2, 35, 150))):
    for mode in ("soft", "straight_through", "reinmax"):
        x, c = torch.randn(shape, requires_grad=True), torch.randn(150, 21, requires_grad=True)
        found = gumbel_quantize(x, c, mode=mode, layout=layout, seed=8, tau=.8, kl_weight=.5)
        (found.z.square().sum() + found.kl).backward()
        numbers += [x.double().norm() for x in (found.z, found.kl, found.indices, x.grad, c.grad)]
    feature = torch.randn(2, 21, 5, 7) if layout == "nchw" else torch.randn(2, 35, 21)
    numbers.append(encode_indices(feature, c.detach(), layout=layout).sum())
print(vlmfast._native.build_info()["isa"], *[float(x) for x in numbers])
"""


def test_instruction_sets_agree():
    assert_agree(ISA_SCRIPT)


def bad_calls():
    logits, codebook = torch.randn(2, 9, 3, 3), torch.randn(9, 4)

    def quantize(*tensors, **options):
        return lambda: gumbel_quantize(*(tensors or (logits, codebook)), **options)

    for tau in (0.0, -1.0, float("inf"), float("nan")):
        yield f"tau {tau}", ValueError, f"gumbel_quantize: tau is {tau}, it must be above 0", quantize(tau=tau)
    yield "kl_weight", ValueError, "kl_weight is -1, it must be 0 or above", quantize(kl_weight=-1)
    yield "mode", ValueError, "mode is 'hard', it must be one of soft, straight_through", quantize(mode="hard")
    yield "layout", ValueError, "layout is 'nhwc', it must be one of nchw, nlc", quantize(layout="nhwc")
    yield "not a tensor", TypeError, "logits is list, it must be a float32", quantize([1.0], codebook)
    yield "integers", TypeError, "logits is torch.int64", quantize(logits.long(), codebook)
    yield "rank", ValueError, r"logits has shape \(9, 3, 3\), it must be \[B, V, H, W\]", quantize(logits[0], codebook)
    yield "rank of nlc", ValueError, r"it must be \[B, L, V\]", quantize(layout="nlc")
    yield "codes", ValueError, r"codebook has shape \(8, 4\), it must be \[V, D\] with the V of the logits, 9", (
        quantize(logits, codebook[:8]))
    yield "no codes", ValueError, "above 0", quantize(logits[:, :0], codebook[:0])
    yield "codebook rank", ValueError, r"codebook has shape \(9,\)", quantize(logits, codebook[:, 0])
    yield "codebook kind", ValueError, "codebook has shape", quantize(logits, None)
    yield "dtype", ValueError, "codebook is torch.float64 on cpu, logits torch.float32", quantize(
        logits, codebook.double())
    yield "device", ValueError, "codebook is torch.float32 on meta", quantize(logits, codebook.to("meta"))
    yield "noise shape", ValueError, r"noise has shape \(2, 9, 3, 2\), it must be .* \(2, 9, 3, 3\)", quantize(
        noise=logits[..., :2])
    yield "noise kind", ValueError, "noise has shape", quantize(noise=logits.long())
    yield "seed", ValueError, "seed is 9223372036854775808", quantize(seed=2**63)
    yield "seed dtype", TypeError, "seed is .* torch.float32", quantize(seed=torch.tensor(1.0))
    yield "noise layout", ValueError, r"gumbel_noise: shape is \(3, 4\), it must be \[B, V, H, W\]", lambda: (
        gumbel_noise((3, 4), 0, layout="nchw"))
    yield "noise without shape", ValueError, "shape is empty", lambda: gumbel_noise((), 0)
    features, weight = torch.randn(1, 5, 2, 2), torch.randn(7, 5)
    yield "features", ValueError, r"features has shape \(5, 2, 2\)", lambda: encode_indices(features[0], weight)
    yield "weight", ValueError, r"weight has shape \(7, 4\), it must be \[V, 5\]", lambda: encode_indices(
        features, weight[:, :4])
    yield "kernel", ValueError, "weight has shape", lambda: encode_indices(features, torch.randn(7, 5, 3, 3))
    yield "bias", ValueError, r"bias has shape \(6,\), it must be \[7\]", lambda: encode_indices(
        features, weight, torch.zeros(6))
    yield "weight dtype", ValueError, "weight is torch.float64", lambda: encode_indices(features, weight.double())
    yield "width", ValueError, r"vector_quantize: codebook has shape \(7, 4\), it must be \[V, 5\]", lambda: (
        vector_quantize(features, weight[:, :4]))
    yield "beta", ValueError, "beta is -1", lambda: vector_quantize(features, weight, beta=-1)
    yield "codebook dtype", ValueError, "codebook is torch.bfloat16 on cpu, x torch.float32", lambda: vector_quantize(
        features, weight.bfloat16())


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
def test_bad_input_is_named(case):
    _, error, message, call = case
    with pytest.raises(error, match=message):
        call()
