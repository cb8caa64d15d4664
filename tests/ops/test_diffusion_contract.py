"""Schedules, registration, compilation, instruction sets and refusals of the diffusion family."""

import numpy as np
import pytest
import torch
from diffusion_helpers import SCHEDULE, case
from instruction_sets import assert_agree

from vlmfast.diffusion import Schedule
from vlmfast.ops import denoise_step, diffusion_loss, diffusion_noise, q_sample

T = torch.tensor([0, 7, 49])


def test_spacings():
    long = Schedule.cosine(1000)
    hundred = long.respace("100").timestep_map
    assert hundred[0] == 0 and hundred[-1] == 999 and len(hundred) == 100 and list(hundred[1:3]) == [10, 20]
    fast = long.respace("fast27").timestep_map
    assert len(fast) == 27 and list(fast[:2]) == [0, 22] and list(fast[-3:]) == [799, 800, 997]
    assert list(long.respace("ddim50").timestep_map) == list(range(0, 1000, 20))
    assert list(long.respace([3, 900, 10]).timestep_map) == [3, 10, 900]
    assert long.respace(7).num_timesteps == len(long.respace("3,4")) == 7
    twice = long.respace("100").respace("10")
    assert twice.original_steps == 1000 and set(twice.timestep_map) <= set(hundred)


def test_respacing_keeps_the_noise_levels():
    long = Schedule.linear(1000)
    short = long.respace("27")
    assert np.allclose(short.alphas_cumprod, long.alphas_cumprod[short.timestep_map], rtol=1e-12)
    assert np.allclose(short.alphas_cumprod_prev[1:], short.alphas_cumprod[:-1], rtol=1e-12)
    assert short.model_timesteps(26) == 999
    assert torch.equal(short.model_timesteps(torch.tensor([0, 26])), torch.tensor([0, 999]))


@pytest.mark.parametrize("steps, error, message", [
    ("abc", ValueError, "steps is 'abc', it must be a number, numbers separated by commas"),
    ("10,", ValueError, "it must be a number"), ("0", ValueError, "it must be a number"),
    ("ddim30", ValueError, "no constant stride takes 30 of 50"), ("fast", ValueError, "it must be a number"),
    ("51", ValueError, "asks for 51 of the 50"), ("10,41", ValueError, "asks for 41 of the 25"),
    ([3, 3], ValueError, "distinct timesteps from 0 to 49"), ([50], ValueError, "from 0 to 49"),
    ([], ValueError, "distinct"), (None, TypeError, "it must be a string"), (2.5, TypeError, "it must be a string")],
    ids=str)
def test_unknown_spacings_are_named(steps, error, message):
    with pytest.raises(error, match=message):
        SCHEDULE.respace(steps)


@pytest.mark.parametrize("betas, message", [([], "T above 0"), ([[0.1]], "T above 0"), ([0.1, 0.0], "above 0"),
                                            ([0.1, 1.5], "at most 1"), ([float("nan")], "above 0")], ids=str)
def test_impossible_betas_are_named(betas, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_betas(betas)
    with pytest.raises(ValueError, match="steps is 0"):
        Schedule.linear(0)


def test_a_last_beta_of_one_leaves_v_finite():
    schedule = Schedule.from_betas([0.1, 0.5, 1.0])
    x, output, noise = case(learned=False)
    for sampler in ("ancestral", "ddim"):
        found = denoise_step(x, output, 2, schedule, prediction="v", variance="fixed_small", sampler=sampler, seed=1)
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    x, output, noise = (a.flatten(2) for a in case(dtype=dtype, guided=True))
    image, mask = noise + 1, (noise[:, :1] > 0).to(torch.promote_types(dtype, torch.float32))
    table = SCHEDULE.table("step", "ancestral", "epsilon", "learned_range", 0.0, True, device=x.device)
    op, seed = torch.ops.vlmfast.denoise_step.default, torch.tensor(3)
    torch.library.opcheck(op, (x, output, T, 0, table, 2.0, True, True, 1.0, None, mask, image, noise, [], [], noise,
                               None, 0, True, True, True))
    torch.library.opcheck(op, (x, output[:3, :2], None, 4, table, 1.0, False, False, 1.0, x[:, 0, 0].abs() + 1, None,
                               None, None, [noise], [1.5, -0.5], None, seed, 3, True, False, False))
    losses = SCHEDULE.table("loss", "epsilon", "learned_range", device=x.device)
    torch.library.opcheck(torch.ops.vlmfast.diffusion_loss.default, (output[:3], noise, x, T, 0, losses, True))
    upstream = torch.rand(3, dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(torch.ops.vlmfast.diffusion_loss_bwd.default,
                          (upstream, upstream, output[:3], noise, x, T, 0, losses, True))


@pytest.mark.slow
def test_compiles_to_one_graph():
    x, output, noise = case(guided=True)
    clean = case(seed=3)[0]

    def steps(x, output, t):
        x = denoise_step(x, output, t, SCHEDULE, guidance_scale=2.0, seed=3)
        return denoise_step(x, output[:3], 4, SCHEDULE, sampler="ddim", eta=0.5, seed=3, offset=1) + q_sample(
            x, t, SCHEDULE, noise=noise)

    with torch.no_grad():
        assert torch.allclose(torch.compile(steps, fullgraph=True, backend="aot_eager")(x, output, T),
                              steps(x, output, T), atol=1e-6)

    def loss(output):
        return diffusion_loss(output * 1.0, noise, clean, T, SCHEDULE).sum()

    leaf = output[:3].clone().requires_grad_()
    plain, ours = loss(leaf), torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.allclose(*(torch.autograd.grad(a, leaf)[0] for a in (plain, ours)), atol=1e-7)


def test_second_derivative_is_refused():
    _, output, noise = case()
    leaf = output.requires_grad_()
    loss = diffusion_loss(leaf, noise, noise, T, SCHEDULE).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="diffusion_loss: the second derivative is not implemented"):
        gradient.square().sum().backward()


def test_empty_batches_and_images():
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        x, output, noise = case(shape)
        t = T[:shape[0]] % 50
        assert denoise_step(x, output, t, SCHEDULE).shape == shape
        assert denoise_step(x, output, t, SCHEDULE, dynamic_threshold=0.9).shape == shape
        assert q_sample(x, t, SCHEDULE, noise=noise).shape == shape and diffusion_noise(shape, 1).shape == shape
    assert diffusion_loss(torch.zeros(0, 6, 4, 4), torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4),
                          torch.zeros(0, dtype=torch.int64), SCHEDULE).shape == (0,)


def test_a_half_precision_model_under_autocast():
    _, output, noise = case()
    leaf = output.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = diffusion_loss(leaf, noise, noise * 0.5, T, SCHEDULE)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and leaf.grad.any()


ISA_SCRIPT = """
import torch, vlmfast._native
from vlmfast.diffusion import Schedule
from vlmfast.ops import denoise_step, diffusion_loss, diffusion_noise
torch.manual_seed(3)
schedule, t = Schedule.linear(100), torch.tensor([0, 50, 99])
numbers = [diffusion_noise((3, 7, 33), 5).double().norm(), diffusion_noise((3, 7, 33), 5, 1)[1, 3, 5]]
for dtype in (torch.float32, torch.bfloat16):
    x, output = torch.randn(3, 2, 9, 31).to(dtype), torch.randn(6, 4, 9, 31).to(dtype)
    for options in ({}, {"sampler": "ddim", "eta": .5}, {"clamp": False}):
        numbers.append(denoise_step(x, output, t, schedule, guidance_scale=2., seed=1, **options).double().norm())
    leaf = output[:3].clone().requires_grad_()
    loss = diffusion_loss(leaf, x, (x / 2).clamp(-1, 1), t, schedule)
    loss.sum().backward()
    numbers += [loss.double().norm(), leaf.grad.double().norm()]
print(vlmfast._native.build_info()["isa"], *[float(x) for x in numbers])
"""


def test_instruction_sets_agree():
    assert_agree(ISA_SCRIPT)


def bad_calls():
    x, output, noise = case((2, 3, 4, 5))

    def step(*tensors, t=3, **options):
        return lambda: denoise_step(*(tensors or (x, output)), t, SCHEDULE, **options)

    yield "t", ValueError, "t is 50, it must lie between 0 and 49", step(t=50)
    yield "negative t", ValueError, "t is -1, it must lie", step(t=-1)
    yield "t in a tensor", ValueError, "t is 50, it must lie", step(t=torch.tensor([3, 50]))
    yield "shape of t", ValueError, r"t has shape \(3,\), it must be \[2\]", step(t=torch.tensor([3, 5, 7]))
    yield "type of t", TypeError, "t is torch.float32", step(t=torch.tensor([3.0, 4.0]))
    yield "kind of t", TypeError, "t is a float", step(t=3.0)
    yield "sampler", ValueError, "sampler is 'euler', it must be one of ancestral, ddim", step(sampler="euler")
    yield "prediction", ValueError, "prediction is 'noise'", step(prediction="noise")
    yield "variance", ValueError, "variance is 'fixed'", step(variance="fixed")
    yield "channels", ValueError, r"model_output has shape \(2, 3, 4, 5\), it must be \[2, 6, 4, 5\]: 6 channels of " \
        "noise and variance", step(x, output[:, :3])
    yield "channels of a fixed variance", ValueError, r"must be \[2, 3, 4, 5\]", step(variance="fixed_small")
    yield "guided rows", ValueError, r"must be \[4, 6, 4, 5\].* with the prompt before those without", step(
        guidance_scale=2.0)
    yield "unguided rows", ValueError, r"model_output has shape \(4, 6, 4, 5\)", step(x, output.repeat(2, 1, 1, 1))
    yield "output size", ValueError, r"it must be \[2, 6, 4, 5\]", step(x, output[..., :4])
    yield "integers", TypeError, "x is torch.int64", step(x.long(), output)
    yield "rank", ValueError, r"x has shape \(2,\), it must be \[B, C, ...\]", step(x[:, 0, 0, 0], output)
    yield "output kind", TypeError, "model_output is NoneType", step(x, None)
    yield "guidance_scale", ValueError, "guidance_scale is nan", step(x, output.repeat(2, 1, 1, 1),
                                                                      guidance_scale=float("nan"))
    yield "eta", ValueError, "eta is 1.5, it must lie between 0 and 1", step(sampler="ddim", eta=1.5)
    yield "eta elsewhere", ValueError, "eta is 0.5 with sampler 'ancestral'", step(eta=0.5)
    yield "history", ValueError, "history has 1 entries with sampler 'ancestral'", step(history=[x])
    yield "long history", ValueError, "history has 4 entries", step(sampler="plms", history=[x] * 4)
    yield "clamp", ValueError, "clamp is -1, it must be True, False or a bound", step(clamp=-1)
    yield "threshold", ValueError, "dynamic_threshold is 99, it must be above 0", step(dynamic_threshold=99)
    yield "noise", ValueError, r"noise has shape \(2, 3, 4, 4\)", step(noise=noise[..., :4])
    yield "noise kind", TypeError, "noise is torch.int64", step(noise=noise.long())
    yield "mask", ValueError, r"mask has shape \(2, 1, 4, 4\) on cpu, it must be \[2, 1, 4, 5\]", step(
        mask=noise[:, :1, :, :4], image=x)
    yield "mask alone", ValueError, "image is missing", step(mask=noise)
    yield "image alone", ValueError, "mask is missing", step(image=x)
    yield "image", ValueError, "image has shape", step(mask=noise, image=x[:1])
    yield "mean_shift", ValueError, "mean_shift has shape", step(mean_shift=x[:1])
    yield "seed", ValueError, "seed is 9223372036854775808", step(seed=2**63)
    yield "offset", ValueError, "offset is -1, it must be an integer from 0", step(offset=-1)
    yield "schedule", TypeError, "schedule is a str", lambda: denoise_step(x, output, 3, "100")
    yield "noising", ValueError, "q_sample: t is 50", lambda: q_sample(x, 50, SCHEDULE)
    yield "noise shape", ValueError, "diffusion_noise: shape is empty", lambda: diffusion_noise((), 3)
    yield "loss channels", ValueError, r"diffusion_loss: model_output has shape \(2, 3, 4, 5\)", lambda: diffusion_loss(
        output[:, :3], noise, x, 3, SCHEDULE)
    yield "loss t", ValueError, "t is 50", lambda: diffusion_loss(output, noise, x, torch.tensor([3, 50]), SCHEDULE)
    yield "loss noise", TypeError, "diffusion_loss: noise is NoneType", lambda: diffusion_loss(output, None, x, 3,
                                                                                               SCHEDULE)
    yield "loss gradient", ValueError, "noise or x0 wants a gradient", lambda: diffusion_loss(
        output, noise, x.clone().requires_grad_(), 3, SCHEDULE)


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
def test_bad_input_is_named(case):
    _, error, message, call = case
    with pytest.raises(error, match=message):
        call()
