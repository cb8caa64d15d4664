"""The objective of discrete VAEs against its formula, and the schedules at the points that define them."""

import math

import pytest
import torch

from vlmfast.layers.pixels import map_pixels, unmap_pixels
from vlmfast.objectives import Annealing, dalle_loss, discrete_vae_loss, logit_laplace_loss
from vlmfast.objectives.variational import (
    DALLE_KL_WEIGHT,
    DALLE_LEARNING_RATE,
    DALLE_TEMPERATURE,
    reconstruction_loss,
)


def test_the_logit_laplace_density_integrates_to_one():
    # over mapped pixels x in 0 ... 1; the map stretches 0 ... 1 to eps ... 1 - eps, so image runs beyond it here
    x = torch.linspace(0, 1, 200_002, dtype=torch.float64)[1:-1]
    image = ((x - 0.1) / 0.8).view(-1, 1, 1, 1)
    for mean, log_scale in ((0.0, 0.0), (1.5, -1.0), (-0.7, 0.4)):
        statistics = torch.tensor([mean, log_scale], dtype=torch.float64).view(1, 2, 1, 1).expand(len(x), -1, -1, -1)
        density = (-logit_laplace_loss(statistics, image)).exp()
        assert density.mean().item() == pytest.approx(1, abs=1e-3)


def test_logit_laplace_matches_torch_distributions():
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    statistics = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    laplace = torch.distributions.Laplace(statistics[:, :3], statistics[:, 3:].exp())
    sigmoid = torch.distributions.TransformedDistribution(laplace, [torch.distributions.transforms.SigmoidTransform()])
    truth = -sigmoid.log_prob(0.8 * image + 0.1).sum((1, 2, 3))
    torch.testing.assert_close(logit_laplace_loss(statistics, image), truth, rtol=1e-12, atol=1e-12)


def test_logit_laplace_is_finite_and_differentiable_at_black_and_white():
    image = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    statistics = torch.randn(1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(logit_laplace_loss(statistics, image)).all()
    assert torch.autograd.gradcheck(lambda s: logit_laplace_loss(s, image.double()), statistics)
    with pytest.raises(ValueError, match=r"must be \[B, 2 C, H, W\]"):
        logit_laplace_loss(torch.zeros(1, 3, 1, 2), image)


def test_pixels_return_from_their_map():
    image = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(map_pixels(image), torch.tensor([0.1, 0.3, 0.9]))
    torch.testing.assert_close(unmap_pixels(map_pixels(image)), image)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_dalle_objective_at_its_published_size():
    """At 256 x 256 pixels and 32 x 32 codes the weight on the mean over positions is 6.6 / 192 = 0.034."""
    image, statistics = torch.rand(1, 3, 256, 256), torch.zeros(1, 6, 256, 256)
    kl = torch.tensor(2.0)
    loss = dalle_loss(statistics, kl, image, 32 * 32)
    assert (loss.total - loss.reconstruction).item() == pytest.approx(2 * 6.6 / 192, rel=1e-4)
    assert loss.reconstruction.item() == pytest.approx(logit_laplace_loss(statistics, image).item() / 256**2 / 3)
    assert loss.kl.item() == 2


def test_schedules_of_the_paper():
    assert [DALLE_KL_WEIGHT(step) for step in (0, 5000, 10**6)] == [0, 6.6, 6.6]
    assert DALLE_KL_WEIGHT(2500) == pytest.approx(3.3)
    assert (DALLE_TEMPERATURE(0), DALLE_TEMPERATURE(150_000)) == (1, 1 / 16)
    assert (DALLE_LEARNING_RATE(0), DALLE_LEARNING_RATE(3_000_000)) == (1e-4, 1.25e-6)


@pytest.mark.parametrize("shape, middle, third", [
    ("linear", 0.5, 1 / 3), ("half_cosine", 0.5, 0.25), ("quarter_cosine", 1 - math.sqrt(0.5), 1 - math.sqrt(0.75))])
def test_shapes_of_annealing(shape, middle, third):
    change = Annealing(2.0, 4.0, 300, shape)
    assert change(0) == 2 and change(300) == 4 and change(10_000) == 4
    assert change(150) == pytest.approx(2 + 2 * middle) and change(100) == pytest.approx(2 + 2 * third)


def test_exponential_and_constant_annealing():
    change = Annealing(0.9, 0.1, 100, "exponential")
    assert change(50) == pytest.approx(0.3) and change(100) == 0.1
    assert Annealing(0.9, 0.1, 100, "constant")(1000) == 0.9


@pytest.mark.parametrize("arguments, message", [
    ((0.0, 1.0, 5, "exponential"), "an exponential needs one sign"), ((0.0, 1.0, 0), "steps is 0"),
    ((0.0, 1.0, 5, "sine"), "shape is 'sine'")])
def test_annealing_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Annealing(*arguments)
    with pytest.raises(ValueError, match="step is -1"):
        Annealing(0.0, 1.0, 5)(-1)


def test_discrete_vae_loss_adds_its_parts():
    raw, target = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 0.0]])
    expected = {"mse": 2.125, "l1": 1.25, "smooth_l1": (0.125 + 1.5) / 2}
    for kind, value in expected.items():
        loss = discrete_vae_loss(raw, torch.tensor(3.0), target, kind, 0.1, torch.tensor(0.5))
        assert loss.reconstruction.item() == pytest.approx(value) and loss.total.item() == pytest.approx(value + 0.8)
    assert discrete_vae_loss(raw, torch.tensor(float("nan")), target).total.item() == pytest.approx(2.125)
    with pytest.raises(ValueError, match="kind is 'huber'"):
        reconstruction_loss(raw, target, "huber")
    with pytest.raises(ValueError, match="target"):
        reconstruction_loss(raw, target.T)
