"""group_norm_silu against the formula people write, in float64 and in the working type, and the ops' contract."""

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import assert_agree
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch

from vlmfast.ops import backend, group_norm_silu
from vlmfast.ops.reference import group_norm as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (B, C, G, *spatial): rows shorter than a vector, ragged rows, no spatial dimension, rows of several
# chunks, several rows to a chunk, a group larger than what the backward keeps, 1 and 3 spatial dimensions
SHAPES = [(2, 6, 3, 3), (3, 8, 4, 5, 7), (2, 12, 4), (1, 6, 2, 67, 65), (2, 64, 32, 8, 8),
          (1, 40, 1, 50, 50), (2, 3, 3, 131), (1, 4, 2, 3, 5, 7), (1, 2, 1, 210, 160)]
NAMES = "out", "d_x", "d_weight", "d_bias", "d_scale", "d_shift"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def formula(x, groups, weight, bias, scale=None, shift=None, silu=True, eps=1e-5):
    z = torch.group_norm(x, groups, weight, bias, eps)  # F.group_norm refuses a single value
    if scale is not None:
        z = z * (1 + scale.view(*scale.shape, *(1,) * (x.ndim - 2))) + shift.view(*shift.shape, *(1,) * (x.ndim - 2))
    return (F.silu(z) if silu else z).to(x.dtype)


def case(shape, dtype=torch.float32, modulated=True, parameters=None):
    """(x, weight, bias[, scale, shift])."""
    batch, channels, _, *spatial = shape
    x = torch.randn(batch, channels, *spatial, dtype=torch.float64) * 1.7 + 0.6
    others = [torch.randn(channels, dtype=torch.float64) * 0.3 + 1, torch.randn(channels, dtype=torch.float64) * 0.5]
    others += [torch.randn(batch, channels, dtype=torch.float64) * 0.4 for _ in range(2 * modulated)]
    return [x.to(dtype), *(v.to(parameters or dtype) for v in others)]


def ours(x, groups, weight, bias, scale=None, shift=None, **options):
    return group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift, **options)


def upstream(out):
    """A fixed direction, exact in every type."""
    return torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype) / 8


def run(function, leaves, groups, **options):
    """The output, and the gradients of its inner product with a fixed direction."""
    leaves = [v.detach().requires_grad_() for v in leaves]
    out = function(leaves[0], groups, *leaves[1:], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


def terms(leaves, groups, **options):
    """Size of the gradient of x before the two means are taken from it: what it rounds to where they leave little."""
    with torch.no_grad():
        _, rstd = reference.statistics(reference.lines(leaves[0].double()), groups, 1e-5)
    x, *rest = (v.detach().double() for v in leaves)
    x.requires_grad_()
    rstd = rstd.repeat_interleave(x.shape[1] // groups, 1).view(*x.shape[:2], *(1,) * (x.ndim - 2))
    normal = torch.group_norm(x, groups, eps=1e-5).detach() + (x - x.detach()) * rstd
    weight, bias, *modulation = (v.view(-1, x.shape[1], *(1,) * (x.ndim - 2)) for v in rest)
    z = normal * weight + bias
    z = z * (1 + modulation[0]) + modulation[1] if modulation else z
    out = F.silu(z) if options.get("silu", True) else z
    return torch.autograd.grad(out, x, upstream(out))[0].norm().item()


def compare(leaves, groups, **options):
    mine, truth = run(ours, leaves, groups, **options), run(formula, [v.double() for v in leaves], groups, **options)
    plain = run(formula, leaves, groups, **options)
    few = leaves[0][0].numel() // groups <= 4
    for at, name in enumerate(NAMES[:len(mine)]):
        assert mine[at].dtype == plain[at].dtype and mine[at].shape == truth[at].shape, name
        norm = terms(leaves, groups, **options) if name == "d_x" and few else truth[at].norm().item()
        if leaves[0].dtype == torch.float64:
            assert (mine[at] - truth[at]).norm() <= 1e-12 * norm, name
        else:
            assert_no_worse_than_torch(mine[at], truth[at], plain[at], factor=3.0 if at else 2.0, size=norm, what=name)
            if not (few and name == "d_x"):
                assert_grad_not_dropped(mine[at][:, None], truth[at][:, None], what=name)
    return mine


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "affine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(shape, dtype, modulated, silu, name):
    with backend(name):
        compare(case(shape, dtype, modulated), shape[2], silu=silu)


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_half_precision_activations_with_float32_parameters(dtype, name):
    shape = (2, 16, 4, 9, 7)
    leaves = case(shape, dtype, parameters=torch.float32)
    with backend(name):
        mine = run(ours, leaves, 4)
    truth = run(formula, [v.double() for v in leaves], 4)
    eager = run(lambda x, *rest, **o: formula(x.float(), *rest, **o).to(x.dtype), leaves, 4)
    for at, what in enumerate(NAMES):
        assert mine[at].dtype == (dtype if at < 2 else torch.float32)
        assert_no_worse_than_torch(mine[at], truth[at], eager[at], factor=3.0 if at else 2.0, what=what)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_large_mean_costs_no_digits(name):
    """Values exact in float32 at a distance of 2^14 whose standard deviation is 1."""
    x = (torch.randn(2, 6, 40, 41) * 256).round() / 256
    _, weight, bias, scale, shift = case((2, 6, 2, 1))
    near = run(formula, [v.double() for v in (x, weight, bias, scale, shift)], 2)
    with backend(name):
        far = run(ours, (x + 16384, weight, bias, scale, shift), 2)
    assert torch.equal(x.double() + 16384, (x + 16384).double())
    for what, a, b in zip(NAMES, far, near, strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm(), what


def test_gradcheck():
    for shape in ((2, 4, 2, 3, 3), (1, 3, 1, 5)):
        for silu in (True, False):
            for modulated in (True, False):
                leaves = [v.requires_grad_() for v in case(shape, torch.float64, modulated)]
                assert torch.autograd.gradcheck(lambda x, *p, g=shape[2], s=silu: ours(x, g, *p, silu=s), leaves)


def test_backward_after_the_group_leaves_the_cache():
    """Groups on both sides of the size up to which the backward keeps the gradient behind SiLU give the same."""
    for side in (180, 182):
        leaves = case((1, 4, 2, side, side))
        assert (2 * side * side <= 1 << 16) == (side == 180)
        compare(leaves, 2)


def test_gradients_of_some_inputs_alone():
    shape = (2, 6, 3, 5, 5)
    leaves = case(shape)
    everything = run(ours, leaves, 3)[1:]
    for wanted in range(5):
        inputs = [v.detach().requires_grad_(at == wanted) for at, v in enumerate(leaves)]
        out = ours(inputs[0], 3, *inputs[1:])
        (found,) = torch.autograd.grad(out, inputs[wanted], upstream(out))
        assert torch.equal(found, everything[wanted]), NAMES[wanted + 1]


def strided_inputs():
    wide = torch.randn(2, 12, 9, 8)
    yield "channels skipped", wide[:, ::2]
    yield "rows cut", wide[:, 3:9, :, 1:7]
    yield "channels last", torch.randn(2, 6, 9, 8).to(memory_format=torch.channels_last)
    yield "batch expanded", torch.randn(1, 6, 9, 8).expand(2, -1, -1, -1)
    yield "positions expanded", torch.randn(2, 6, 1, 1).expand(-1, -1, 9, 8)
    yield "transposed", torch.randn(2, 6, 8, 9).transpose(2, 3)
    yield "one position", torch.randn(2, 12, 1, 1)[:, ::2]
    yield "columns of a matrix", torch.randn(2, 12)[:, 1:7]


@pytest.mark.parametrize("case_of", list(strided_inputs()), ids=lambda c: c[0])
def test_strides_do_not_matter(case_of):
    x = case_of[1].detach()
    _, weight, bias, *_ = case((2, 6, 3, 1))
    embedding = torch.randn(2, 18)
    parameters = [weight.repeat_interleave(2)[::2], bias, *embedding[:, 3:15].chunk(2, 1)]
    found = run(ours, [x, *parameters], 3)
    same = run(ours, [x.contiguous(), *(p.contiguous() for p in parameters)], 3)
    for what, a, b in zip(NAMES, found, same, strict=True):
        assert torch.equal(a, b), what
    assert found[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_of_any_strides(dtype):
    leaves = [v.requires_grad_() for v in case((2, 6, 3, 9, 8), dtype)]
    out = ours(leaves[0], 3, *leaves[1:])
    for up in (torch.ones((), dtype=dtype).expand(out.shape), torch.randn(2, 6, 8, 9, dtype=dtype).transpose(2, 3),
               torch.randn(2, 12, 9, 8, dtype=dtype)[:, ::2]):
        strided = torch.autograd.grad(out, leaves, up, retain_graph=True)
        packed = torch.autograd.grad(out, leaves, up.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))


@pytest.mark.parametrize("shape", [(2, 64, 32, 16, 16), (1, 4, 1, 130, 131), (1, 8, 2, 200, 190), (1, 8, 4, 100, 200),
                                   (3, 6, 3, 1)],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(shape, dtype):
    leaves, before = case(shape, dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(ours, leaves, shape[2]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for what, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), what


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_nan_stays_within_its_group(bad, name):
    x, weight, bias, scale, shift = case((2, 6, 3, 9, 8))
    clean = run(ours, (x, weight, bias, scale, shift), 3)
    x[1, 2, 4, 4] = bad  # group 1 of example 1: channels 2 and 3
    with backend(name):
        found = run(ours, (x, weight, bias, scale, shift), 3)
    outside = torch.ones(2, 6, dtype=torch.bool)
    outside[1, 2:4] = False
    channels = outside.all(0)
    for what, a, b in zip(NAMES, found, clean, strict=True):
        kept = channels if a.ndim == 1 else outside
        assert (a[kept] - b[kept]).abs().max() < 1e-4, what
        assert a[~kept].isnan().any() if what != "out" else a[~kept].isnan().all(), what


def test_extreme_activations_stay_finite():
    x = torch.randn(1, 4, 8, 9)
    for weight in (torch.full((4,), 300.0), torch.full((4,), 1e30)):
        for bias in (torch.zeros(4), torch.full((4,), -200.0)):
            leaves = [v.requires_grad_() for v in (x.clone(), weight, bias)]
            out = ours(leaves[0], 2, *leaves[1:])
            assert out.isfinite().all() and out.min() > -0.3
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves[1:]))


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("groups, side", [(3, 5), (6, 1)])
def test_constant_groups(groups, side, name):
    _, weight, bias, scale, shift = case((2, 6, 3, 1))
    with backend(name):
        out, d_x, d_weight, *_ = run(ours, (torch.full((2, 6, side, side), 7.3), weight, bias, scale, shift), groups)
    assert (out - F.silu(bias * (1 + scale) + shift)[..., None, None]).abs().max() < 1e-6
    assert d_weight.abs().max() < 1e-4 and d_x.isfinite().all()
    if side == 1:
        assert d_x.abs().max() < 1e-3


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("shape", [(0, 6, 3, 4, 4), (2, 0, 3, 4, 4), (2, 6, 3, 0, 4), (0, 6, 3)], ids=str)
def test_empty_dimensions(shape, name):
    with backend(name):
        leaves = case(shape)
        results = run(ours, leaves, shape[2])
    for a, b in zip(results, [leaves[0], *leaves], strict=True):
        assert a.shape == b.shape and not a.any()


def test_nothing_of_the_size_of_x_is_kept_beside_it():
    leaves, saved = [v.requires_grad_() for v in case((2, 32, 8, 16, 16), torch.bfloat16)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(leaves[0], 8, *leaves[1:])
    large = [t for t in saved if t.numel() >= leaves[0].numel()]
    assert len(large) == 1 and large[0].data_ptr() == leaves[0].data_ptr()
    assert sorted(t.numel() for t in saved) == [32, 32, 32, 64, 64, leaves[0].numel()]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "affine"])
def test_opcheck(dtype, modulated):
    x, weight, bias, *rest = case((2, 6, 3, 5, 4), dtype, modulated)
    scale, shift = rest or (None, None)
    ops = torch.ops.vlmfast
    for each in (x, x.to(memory_format=torch.channels_last), torch.randn(2, 6).to(dtype)):
        arguments = each, weight, bias, scale, shift, 3, 1e-5, True
        torch.library.opcheck(ops.group_norm_fwd.default, arguments)
        out, statistics = ops.group_norm_fwd(*arguments)
        for need_x in (True, False):
            torch.library.opcheck(ops.group_norm_bwd.default, (torch.randn_like(out), each, statistics, weight, bias,
                                                               scale, shift, True, need_x))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def step(x, *parameters):
        return ours(x * 1.0, 3, *parameters).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for side in (5, 6):
        leaves = [v.requires_grad_() for v in case((2, 6, 3, side, 4))]
        plain, found = step(*leaves), compiled(*leaves)
        assert abs(plain - found) <= 1e-6 * abs(plain)
        for a, b in zip(torch.autograd.grad(plain, leaves), torch.autograd.grad(found, leaves), strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()


def test_checkpointing_repeats_the_result():
    from torch.utils.checkpoint import checkpoint

    leaves = [v.requires_grad_() for v in case((2, 6, 3, 5, 4))]
    plain = torch.autograd.grad(ours(leaves[0], 3, *leaves[1:]).square().sum(), leaves)
    again = checkpoint(lambda x, *p: ours(x, 3, *p).square().sum(), *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(again, leaves), strict=True))


def test_second_derivative_is_refused():
    leaves = [v.requires_grad_() for v in case((2, 6, 3, 5, 4))]
    out = ours(leaves[0], 3, *leaves[1:])
    gradients = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu: the second derivative is not implemented"):
        sum(g.square().sum() for g in gradients).backward()


def test_autocast_keeps_the_type_of_x():
    x, weight, bias, scale, shift = (v.requires_grad_() for v in case((2, 6, 3, 5, 4)))
    half = [v.bfloat16() for v in (scale, shift)]
    plain = group_norm_silu(x, 3, weight, bias, scale=half[0].float(), shift=half[1].float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = group_norm_silu(x, 3, weight, bias, scale=half[0], shift=half[1])
        assert group_norm_silu(x.bfloat16(), 3, weight, bias).dtype == torch.bfloat16
        with backend("reference"):
            same = group_norm_silu(x, 3, weight, bias, scale=half[0], shift=half[1])
    assert found.dtype == same.dtype == torch.float32 and torch.equal(found, plain)
    found.sum().backward()
    assert scale.grad.dtype == torch.float32 and scale.grad.any()


ISA_SCRIPT = """
import torch, vlmfast._native
from vlmfast.ops import group_norm_silu
torch.manual_seed(3)
numbers = []
for shape in ((2, 12, 9, 7), (1, 4, 80, 60), (1, 4, 200, 190)):
    for silu in (True, False):
        x, w, b = torch.randn(shape, requires_grad=True), *torch.randn(2, shape[1]).requires_grad_().unbind()
        out = group_norm_silu(x, 2, w, b, silu=silu)
        numbers += [v.double().norm() for v in (out, *torch.autograd.grad(out.square().sum(), (x, w, b)))]
print(vlmfast._native.build_info()["isa"], *[float(v) for v in numbers])
"""


def test_instruction_sets_agree():
    assert_agree(ISA_SCRIPT)


def test_reference_gradients_are_those_of_autograd():
    for modulated in (True, False):
        x, weight, bias, *rest = case((2, 6, 3, 5, 4), torch.float64, modulated)
        scale, shift = rest or (None, None)
        truth = run(formula, [x, weight, bias, *rest], 3)
        out, mean, rstd = reference.forward(x, 3, weight, bias, scale, shift, 1e-5, True)
        found = [out, *reference.backward(upstream(out), x, mean, rstd, weight, bias, scale, shift, True)]
        for a, b in zip(found, truth, strict=False):
            assert (a - b).norm() <= 1e-12 * b.norm()


def bad_calls():
    x, weight, bias, scale, shift = case((2, 6, 3, 5, 4))

    def call(x=x, num_groups=3, weight=weight, bias=bias, **options):
        return lambda: group_norm_silu(x, num_groups, weight, bias, **options)

    yield "not a tensor", TypeError, "group_norm_silu: x is list, it must be a float32", call([1.0])
    yield "integers", TypeError, "x is torch.int64", call(x.long())
    yield "rank", ValueError, r"x has shape \(6,\), it must be \[B, C, \.\.\.\]", call(x[0, :, 0, 0])
    yield "groups", ValueError, "num_groups is 4, it must be a positive divisor of the 6 channels", call(num_groups=4)
    for groups in (0, -3):
        yield f"groups {groups}", ValueError, f"num_groups is {groups}", call(num_groups=groups)
    yield "groups' type", TypeError, "num_groups is 3.0, it must be an int", call(num_groups=3.0)
    yield "groups' kind", TypeError, "num_groups is True", call(num_groups=True)
    for eps in (-1e-5, float("nan"), float("inf")):
        yield f"eps {eps}", ValueError, f"eps is {eps}, it must be a number of 0 or above", call(eps=eps)
    yield "weight", ValueError, r"weight has shape \(5,\), it must be \[6\]", call(weight=weight[:5])
    yield "weight's kind", TypeError, "weight is NoneType, it must be a tensor", call(weight=None)
    yield "bias", ValueError, r"bias has shape \(6, 1\)", call(bias=bias[:, None])
    yield "bias' type", ValueError, "bias is torch.bfloat16, it must be torch.float32 like x", call(
        bias=bias.bfloat16())
    yield "bias' device", ValueError, "bias is on meta, it must be on cpu", call(bias=bias.to("meta"))
    yield "scale alone", ValueError, "shift is None and scale is given, it must be both or neither", call(scale=scale)
    yield "shift alone", ValueError, "scale is None and shift is given", call(shift=shift)
    yield "scale", ValueError, r"scale has shape \(1, 6\), it must be \[2, 6\]", call(scale=scale[:1], shift=shift)
    yield "shift", ValueError, r"shift has shape \(2, 6, 1, 1\)", call(scale=scale, shift=shift[..., None, None])
    yield "shift's type", TypeError, "shift is torch.int64", call(scale=scale, shift=shift.long())


@pytest.mark.parametrize("case_of", list(bad_calls()), ids=lambda c: c[0])
def test_bad_input_is_named(case_of):
    _, error, message, call = case_of
    with pytest.raises(error, match=message):
        call()
