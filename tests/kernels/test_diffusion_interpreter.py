"""Triton's diffusion kernels, interpreted on the CPU, against the float64 definition of the primitives."""

import math

import pytest
import torch
import triton
import triton.language as tl
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch
from vlmfast.kernels import diffusion as kernels
from vlmfast.kernels.diffusion_loss import _likelihood
from vlmfast.kernels.draws import normal_pair

from vlmfast.diffusion import Schedule
from vlmfast.ops import backend, denoise_step, diffusion_loss, diffusion_noise, q_sample
from vlmfast.ops.diffusion_call import parts, rows_of
from vlmfast.ops.diffusion_schedule import PREDICTIONS, VARIANCES
from vlmfast.ops.reference import diffusion as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULE = Schedule.cosine(1000).respace("50")
SEED = torch.tensor(-(2**40) - 3)
# (B, C, S): a single element, less than a block, a whole one, one and a ragged rest, several of odd sizes
SHAPES = [(1, 1, 1), (2, 3, 21), (1, 4, 256), (2, 3, 400), (3, 2, 1537)]


@triton.jit
def normal_kernel(first, second, to, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    cosine, sine = normal_pair(tl.load(first + at).to(tl.uint32), tl.load(second + at).to(tl.uint32))
    tl.store(to + at, cosine)
    tl.store(to + BLOCK + at, sine)


@triton.jit
def likelihood_kernel(x0, centred, level, found, slope, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mass, gradient = _likelihood(tl.load(x0 + at), tl.load(centred + at), tl.load(level + at))
    tl.store(found + at, mass)
    tl.store(slope + at, gradient)


def table_of(sampler="ancestral", prediction="epsilon", variance="learned_range", eta=0.0, clipped=True,
             schedule=SCHEDULE):
    return torch.from_numpy(schedule.step_table(sampler, prediction, variance, eta, clipped))


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


class Case:
    """A call of the primitive, and its definition in any dtype."""

    def __init__(self, shape=(2, 3, 400), dtype=torch.float32, *, table=None, guided=False, learned=True, clamp=1.0,
                 threshold=False, mask=None, shift=False, history=0, noise="given", seed=0, scale=3.0):
        batch, channels, size = shape
        self.table = table_of() if table is None else table
        self.x = draw(*shape, dtype=dtype, seed=seed)
        # as views of something wider, so that rows do not follow each other
        wide = draw(batch * (1 + guided), channels * (1 + learned) + 1, size, dtype=dtype, seed=seed + 1)
        self.out = wide[:, :channels * (1 + learned)]
        self.t = torch.arange(batch) * 7 % len(self.table)
        self.guided, self.learned, self.clamp, self.scale = guided, learned, clamp, scale if guided else 1.0
        self.threshold = 1 + draw(batch, seed=seed + 2).abs() if threshold else None
        self.mask = None if mask is None else (draw(*mask, seed=seed + 3) > 0).float()
        self.image = None if mask is None else draw(*shape, dtype=dtype, seed=seed + 4)
        self.shift = draw(*shape, dtype=dtype, seed=seed + 5) * 0.1 if shift else None
        self.weights = [] if history is None else [(1.0,), (1.5, -0.5), (1.9, -1.3, 0.4), (2.3, -2.4, 1.5, -0.4)][
            history]
        self.history = [draw(*shape, dtype=dtype, seed=seed + 6 + k) for k in range(history or 0)]
        self.noise = draw(*shape, dtype=dtype, seed=seed + 9) if noise == "given" else None
        self.seed = SEED if noise == "drawn" else None

    def ours(self, wanted=(True, True, True), t="own", step=0, offset=0):
        t = self.t if isinstance(t, str) else t
        return kernels.denoise(self.x, self.out, t, step, self.table, self.scale, self.guided, self.learned, self.clamp,
                               self.threshold, self.mask, self.image, self.shift, self.history, list(self.weights),
                               self.noise, self.seed, offset, *wanted)

    def definition(self, dtype, t="own", step=0, noise=None):
        t = self.t if isinstance(t, str) else t
        noise = self.noise if noise is None else noise

        def wide(x):
            return None if x is None else x.to(dtype)

        batch, channels, _ = self.x.shape
        found = reference.denoise(
            wide(self.x), *(wide(a) for a in parts(self.out, batch, channels, self.guided, self.learned)),
            rows_of(self.table, t, step, batch), self.scale, self.clamp, wide(self.threshold), wide(self.mask),
            wide(self.image), wide(self.shift), [wide(a) for a in self.history], tuple(self.weights), wide(noise))
        return [a.to(self.x.dtype) for a in found] if dtype != torch.float64 else found

    def check(self, **given):
        """x', x0 and e against float64, and against the definition in float32 rounded to the samples' type."""
        noise = None
        if self.seed is not None:
            noise = reference.normal_noise(len(self.x), self.x[0].numel(), SEED).view(self.x.shape)
        ours, truth, same = self.ours(**given), self.definition(torch.float64, noise=noise, **given), \
            self.definition(torch.float32, noise=noise, **given)
        for name, our, true, eager in zip(("x", "x0", "e"), ours, truth, same, strict=True):
            assert our.dtype == self.x.dtype
            assert_no_worse_than_torch(our, true, eager, what=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_every_size(shape, guided):
    Case(shape, guided=guided).check()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sampler, eta", [("ancestral", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("ddim_reverse", 0.0)])
def test_every_sampler_in_every_dtype(sampler, eta, dtype):
    random = sampler == "ancestral" or eta
    Case(table=table_of(sampler, eta=eta), dtype=dtype, guided=True, learned=sampler == "ancestral",
         noise="given" if random else None).check()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "plms"])
def test_every_prediction(sampler, prediction):
    table = table_of(sampler, prediction, eta=0.5)
    Case(table=table, learned=False, history=0 if sampler == "plms" else None, clamp=math.inf).check()


@pytest.mark.parametrize("variance", VARIANCES)
def test_every_variance(variance):
    learned = variance.startswith("learned")
    Case(table=table_of(variance=variance), learned=learned).check()


@pytest.mark.parametrize("mask", [(2, 1, 400), (2, 3, 400), (1, 1, 400), (1, 3, 400)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_masks_of_every_shape(mask, dtype):
    Case(dtype=dtype, mask=mask, guided=True).check()


@pytest.mark.parametrize("shape", [(2, 2, 5), (2, 3, 1537)], ids=str)
def test_one_mask_for_channels_that_end_within_a_block(shape):
    Case(shape, mask=(shape[0], 1, shape[2])).check()


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_mean_shift(sampler, clipped):
    Case(table=table_of(sampler, eta=0.3, clipped=clipped), learned=sampler == "ancestral", shift=True).check()


@pytest.mark.parametrize("history", range(4))
@pytest.mark.parametrize("clipped", [True, False])
def test_plms_with_every_history(history, clipped):
    Case(table=table_of("plms", clipped=clipped), learned=False, history=history, noise=None).check()


@pytest.mark.parametrize("clamp, threshold", [(math.inf, False), (0.3, False), (1.0, True)])
def test_bounds_of_x0(clamp, threshold):
    Case(clamp=clamp, threshold=threshold, mask=(2, 1, 400)).check()


def test_everything_at_once():
    for dtype in DTYPES.values():
        Case((3, 2, 700), dtype, guided=True, threshold=True, mask=(3, 1, 700), shift=True, noise="drawn").check()


@pytest.mark.parametrize("step", [0, 1, 49])
def test_one_step_for_all(step):
    case = Case(guided=True, noise="drawn")
    case.check(t=None, step=step)
    each = case.ours(t=torch.full((2,), step))
    assert all(torch.equal(a, b) for a, b in zip(each, case.ours(t=None, step=step), strict=True))


def test_last_step_adds_no_noise():
    case = Case(noise="drawn")
    drawn = case.ours(t=None, step=0)[0]
    case.seed, case.noise = None, torch.full_like(case.x, math.nan)
    assert torch.equal(case.ours(t=None, step=0)[0], drawn) and case.ours(t=None, step=1)[0].isnan().all()


def test_samples_of_one_dtype_and_a_model_output_of_another():
    case = Case(guided=True, noise=None)
    wide = case.ours()
    case.out = case.out.bfloat16()
    narrow = case.ours()
    case.out = case.out.float()
    assert all(torch.equal(a, b) for a, b in zip(narrow, case.ours(), strict=True)) and not torch.equal(wide[0],
                                                                                                        narrow[0])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_not_wanted_is_empty(wanted):
    case = Case(guided=True, shift=True)
    for want, part, whole in zip(wanted, case.ours(wanted), case.ours(), strict=True):
        assert torch.equal(part, whole) if want else part.numel() == 0


@pytest.mark.parametrize("outside", [-1, 50, 2**62, -(2**62)])
def test_timestep_outside_the_schedule_gives_nan(outside):
    for noise in ("given", "drawn", None):
        case = Case(guided=True, noise=noise, mask=(2, 1, 400))
        good = case.ours()
        case.t = torch.tensor([outside, case.t[1]])
        for found, right in zip(case.ours(), good, strict=True):
            assert found[0].isnan().all() and torch.equal(found[1], right[1])


def test_indices_of_64_bits_change_nothing(monkeypatch):
    step, loss = Case((2, 3, 700), guided=True, mask=(2, 1, 700), noise="drawn"), LossCase()
    narrow = *step.ours(), *loss.ours(), kernels.loss_backward(torch.ones(3), torch.ones(3), *loss.arguments())
    monkeypatch.setattr(kernels, "_wide", lambda x: True)
    wide = *step.ours(), *loss.ours(), kernels.loss_backward(torch.ones(3), torch.ones(3), *loss.arguments())
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_nan_in_an_input_stays():
    case = Case(clamp=1.0)
    case.x[0, 0, 3] = math.nan
    for found in case.ours()[:2]:
        assert found[0, 0, 3].isnan() and found.isnan().sum() == 1


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_empty_dimensions(shape):
    assert all(found.shape == shape for found in Case(shape).ours())
    case = LossCase(shape)
    squared, bound = case.ours()
    assert squared.shape == bound.shape == (shape[0],)
    assert kernels.loss_backward(squared, bound, *case.arguments()).shape == case.out.shape


def test_float64_is_refused():
    with pytest.raises(TypeError, match="x is torch.float64, the Triton backend takes float32"):
        Case(dtype=torch.float64).ours()
    with pytest.raises(TypeError, match="model_output is torch.float64, the Triton backend takes float32"):
        LossCase((1, 2, 3), torch.float64).ours()


# Noise


def noise_of(shape, offset=0, seed=SEED):
    """What the kernel draws, by the table that leaves nothing else."""
    with backend("triton"):
        return diffusion_noise(shape, seed, offset)


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 2, 63), (2, 3, 700)], ids=str)
@pytest.mark.parametrize("offset", [0, 5, 2**31, 2**32 - 1])
def test_noise_is_that_of_the_definition(shape, offset):
    truth = reference.normal_noise(shape[0], shape[1] * shape[2], SEED, offset).view(shape)
    assert (noise_of(shape, offset) - truth).abs().max() < 2e-6


def test_noise_is_that_of_the_cpu_kernel():
    with backend("native"):
        native = diffusion_noise((2, 3, 700), 11)
    assert (noise_of((2, 3, 700), seed=torch.tensor(11)) - native).abs().max() < 3e-6


def test_extreme_words_give_finite_noise():
    ends = [0, 1, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**32 - 2**29, 2**32 - 2, 2**32 - 1, 1234567,
            2**32 - 1234567]
    first, second = (x.flatten() for x in torch.meshgrid(torch.tensor(ends), torch.tensor(ends), indexing="ij"))
    first, second = (torch.cat([x, torch.zeros(256 - len(x), dtype=torch.int64)]) for x in (first, second))
    found = torch.empty(2, 256)
    normal_kernel[(1,)](first, second, found, BLOCK=256)
    radius = (-2 * torch.log1p(-(first.double() + 0.5) * 2.0**-32)).sqrt()
    angle = (second.double() + 0.5) * (2.0**-31 * math.pi)
    truth = torch.stack([radius * angle.cos(), radius * angle.sin()])
    assert ((found - truth).abs() <= 2e-7 * radius).all() and 6.6 < found.abs().max() < 6.8


def test_drawn_noise_is_the_materialised_one():
    case = Case(guided=True, noise="drawn")
    drawn = case.ours(offset=9)
    case.noise, case.seed = noise_of(case.x.shape, 9), None
    assert all(torch.equal(a, b) for a, b in zip(drawn, case.ours(), strict=True))


def test_draws_do_not_depend_on_the_batch():
    assert torch.equal(noise_of((5, 2, 700))[:2], noise_of((2, 2, 700)))
    assert not torch.equal(noise_of((2, 2, 700)), noise_of((2, 2, 700), 1))


# Loss


class LossCase:
    """A call of the loss's primitive whose samples are at steps among which the first is, and its definition."""

    def __init__(self, shape=(3, 2, 700), dtype=torch.float32, *, prediction="epsilon", variance="learned_range",
                 seed=0, schedule=SCHEDULE):
        batch, channels, size = shape
        self.learned = variance.startswith("learned")
        self.table = torch.from_numpy(schedule.loss_table(prediction, variance))
        wide = draw(batch, channels * (1 + self.learned) + 1, size, dtype=dtype, seed=seed)
        self.out = wide[:, :channels * (1 + self.learned)]
        self.noise, self.x0 = draw(*shape, dtype=dtype, seed=seed + 1), draw(*shape, dtype=dtype, seed=seed + 2) * 0.6
        self.x0 = self.x0.clamp(-1, 1)
        if variance == "learned":
            self.out[:, channels:] *= 0.5
            self.out[:, channels:] -= 3
        # a model that is right to a few grey levels, as trained ones are
        target = self.table[0, 0] * self.noise.double() + self.table[0, 1] * self.x0.double()
        if batch:
            self.out[0, :channels] = (target[0] + 0.3 * self.out[0, :channels]).to(dtype)
        self.t = torch.arange(batch) * 11 % len(self.table)

    def arguments(self):
        return self.out, self.noise, self.x0, self.t, 0, self.table, self.learned

    def ours(self):
        return kernels.loss(*self.arguments())

    def definition(self, dtype, upstream=None):
        channels, out = self.noise.shape[1], self.out.to(dtype).requires_grad_()
        found = reference.loss(out[:, :channels], out[:, channels:] if self.learned else None, self.noise.to(dtype),
                               self.x0.to(dtype), rows_of(self.table, self.t, 0, len(out)))
        if upstream is None:
            return [a.detach() for a in found]
        total = sum((a * up).sum() for a, up in zip(found, upstream, strict=True))
        return torch.autograd.grad(total, out)[0]


def check_loss(case, size=None):
    upstream = [draw(len(case.out), seed=k) for k in (3, 4)]
    for name, our, true, eager in zip(("squared", "bound"), case.ours(), case.definition(torch.float64),
                                      case.definition(torch.float32), strict=True):
        assert our.dtype == torch.float32
        if case.learned or name == "squared":
            assert_no_worse_than_torch(our, true, eager, what=name, size=size)
        else:
            assert not our.any()
    ours = kernels.loss_backward(*upstream, *case.arguments())
    truth, same = (case.definition(dtype, [up.to(dtype) for up in upstream])
                   for dtype in (torch.float64, torch.float32))
    for name, part in (("d_output", slice(0, case.noise.shape[1])), ("d_variance", slice(case.noise.shape[1], None))):
        if truth[:, part].numel():
            a, b, c = ours[:, part], truth[:, part], same[:, part].to(ours.dtype)
            assert_no_worse_than_torch(a, b, c, factor=3.0, what=name)
            assert_grad_not_dropped(a, b, what=name)
            for row in range(len(a)):
                assert_no_worse_than_torch(a[row], b[row], c[row], factor=3.0, what=f"{name} {row}")
    assert ours.is_contiguous() and ours.dtype == case.out.dtype


@pytest.mark.parametrize("shape", SHAPES + [(2, 3, 90000)], ids=str)
def test_loss_of_every_size(shape):
    check_loss(LossCase(shape))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["learned_range", "learned", "fixed_small"])
def test_loss_of_every_prediction_and_variance(variance, prediction, dtype):
    check_loss(LossCase(dtype=dtype, prediction=prediction, variance=variance))


@pytest.mark.parametrize("schedule", [Schedule.linear(1000), Schedule.cosine(4000)], ids=["linear", "cosine"])
def test_first_step_of_long_schedules(schedule):
    """Where a grey level is wider than the deviation, and where it is a sliver of it."""
    for seed in range(3):
        case = LossCase((2, 3, 1100), seed=10 * seed, schedule=schedule)
        case.t = torch.zeros(2, dtype=torch.int64)
        check_loss(case)


def test_likelihood_keeps_what_differences_of_the_integral_lose():
    x0 = torch.tensor([-1.0, 0.0, 0.3, 1.0])
    centred = torch.cat([torch.linspace(-0.2, 0.2, 25), torch.linspace(-3, 3, 7)])
    level = torch.cat([torch.linspace(-16, 2, 13), torch.tensor([-60.0, -30.0, 8.0])])
    grid = torch.cartesian_prod(x0, centred, level)
    size = 1 << (len(grid) - 1).bit_length()
    given = [torch.cat([x, torch.zeros(size - len(x))]) for x in grid.unbind(1)]
    found, slope = torch.empty(size), torch.empty(size)
    likelihood_kernel[(1,)](*given, found, slope, BLOCK=size)
    x, c, wide = (a.double() for a in given)
    wide.requires_grad_()
    truth = logistic_log_mass(x, c, wide)
    (gradient,) = torch.autograd.grad(truth.sum(), wide)
    truth = truth.detach()
    assert (found - truth).abs().max() < 2e-5 and ((found - truth).abs() <= 2e-6 * truth.abs() + 2e-6).all()
    # the clamp cuts the gradient off
    near = (truth - math.log(1e-12)).abs() < 1e-4
    error = (slope - gradient).abs()
    assert (error <= 1e-5 * gradient.abs() + 1e-6)[~near].all() and not slope[truth < math.log(1e-12)].any()
    eager = reference.discretized_log_likelihood(*(a.float() for a in given))
    assert (eager - truth).abs().max() > 100 * (found - truth).abs().max()


def logistic_log_mass(x, centred, level):
    """The definition's mass in float64 by logistic functions, which lose nothing far from the mean."""
    z = [(-level / 2).exp() * (centred + step) for step in (1 / 255, -1 / 255)]
    above, below = (2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3) for a in z)
    log = torch.nn.functional.logsigmoid
    inner = log(above) + log(-below) + torch.log(-torch.expm1(below - above))
    return torch.where(x < -0.999, log(above), torch.where(x > 0.999, log(-below), inner)).clamp(min=math.log(1e-12))


@pytest.mark.parametrize("outside", [-1, 50, 2**62])
def test_loss_outside_the_schedule_is_nan(outside):
    case = LossCase()
    good = case.ours()
    gradient = kernels.loss_backward(torch.ones(3), torch.ones(3), *case.arguments())
    case.t = torch.tensor([case.t[0], outside, case.t[2]])
    for found, right in zip(case.ours(), good, strict=True):
        assert found[1].isnan() and torch.equal(found[[0, 2]], right[[0, 2]])
    found = kernels.loss_backward(torch.ones(3), torch.ones(3), *case.arguments())
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], gradient[[0, 2]])


def test_what_has_no_weight_in_the_loss_is_not_read():
    case = LossCase()
    before = case.ours()
    case.x0[1:] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(case.ours(), before, strict=True))
    assert kernels.loss_backward(torch.ones(3), torch.ones(3), *case.arguments()).isfinite().all()
    case = LossCase(prediction="x0")
    case.noise[:] = math.nan
    assert all(found.isfinite().all() for found in case.ours())


def test_losses_do_not_depend_on_the_batch():
    case = LossCase((3, 2, 90000))
    squared, bound = case.ours()
    case.out, case.noise, case.x0, case.t = case.out[1:2], case.noise[1:2], case.x0[1:2], case.t[1:2]
    alone = case.ours()
    assert torch.equal(squared[1:2], alone[0]) and torch.equal(bound[1:2], alone[1])


def test_upstream_gradients_may_be_expanded():
    case, one = LossCase(), torch.ones(())
    a = kernels.loss_backward(one.expand(3), one.expand(3), *case.arguments())
    assert torch.equal(a, kernels.loss_backward(torch.ones(3), torch.ones(3), *case.arguments()))


# Through the ops


def test_ops_agree_with_the_cpu_kernels():
    x, out = draw(2, 3, 11, 13), draw(4, 6, 11, 13)
    t, mask, image = torch.tensor([0, 30]), (draw(2, 1, 11, 13) > 0).float(), draw(2, 3, 11, 13, seed=1)
    results = []
    for name in ("triton", "native"):
        with backend(name):
            results.append([
                *denoise_step(x, out, t, SCHEDULE, guidance_scale=3.0, mask=mask, image=image, seed=5, return_x0=True,
                              return_epsilon=True),
                denoise_step(x, out[:2, :3], 7, SCHEDULE, sampler="ddim", eta=0.4, prediction="v", seed=5, offset=3),
                denoise_step(x, out[:2, :3], t, SCHEDULE, sampler="plms", history=(image,), dynamic_threshold=0.9),
                q_sample(x, t, SCHEDULE, seed=8)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_loss_and_gradient_through_the_op():
    noise, x0 = draw(2, 3, 11, 13), draw(2, 3, 11, 13, seed=1).clamp(-1, 1)
    results = []
    for name in ("triton", "native"):
        out = (0.3 * draw(2, 6, 11, 13, seed=2)).requires_grad_()
        with backend(name):
            loss = diffusion_loss(out, noise, x0, torch.tensor([0, 30]), SCHEDULE, rescale=True)
            loss.sum().backward()
        results.append((loss.detach(), out.grad))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 5e-6 * b.norm()
