"""The objective of text-conditional diffusion."""

import pytest
import torch

from vlmfast.diffusion import Schedule
from vlmfast.objectives import text_diffusion_loss
from vlmfast.objectives.diffusion import PADDING, random_holes, without_text

SCHEDULE = Schedule.cosine(1000).respace("20")
TOKENS = torch.tensor([[3, 4, PADDING], [5, PADDING, PADDING]]).repeat(8, 1)


class Recording:
    """Returns the true noise of what it is given, as a model that knows the pictures would."""

    def __init__(self, images):
        self.images, self.calls = images, []

    def __call__(self, x, t, **options):
        self.calls.append((x, t, options))
        bar = Schedule.cosine(1000).alphas_cumprod[t.numpy()]
        bar = torch.from_numpy(bar).view(-1, 1, 1, 1)
        noise = (x.double() - bar.sqrt() * self.images) / (1 - bar).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], 1).float()


def images(count=16, side=8):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_model_sees_noised_pictures_at_its_own_timesteps():
    x0 = images()
    model = Recording(x0.double())
    found = text_diffusion_loss(model, SCHEDULE, x0, TOKENS, padding=9, generator=torch.Generator().manual_seed(1))
    (x, t, options), = model.calls
    assert set(t.tolist()) <= set(SCHEDULE.timestep_map.tolist()) and len(set(t.tolist())) > 5
    assert found.mse.max() < 1e-8 and found.vb.min() > 0 and found.loss.shape == (16,)
    assert torch.equal(options["tokens"][:2], torch.tensor([[3, 4, 9], [5, 9, 9]]))
    assert torch.equal(options["mask"], TOKENS != PADDING)
    assert x.var() > 0.4


def test_texts_are_left_out_at_the_wanted_rate():
    tokens = torch.ones(4000, 5, dtype=torch.int64)
    dropped = without_text(tokens, 0.2, torch.Generator().manual_seed(0))
    gone = (dropped == PADDING).all(1)
    assert ((dropped == PADDING).any(1) == gone).all() and 0.17 < gone.double().mean() < 0.23
    assert without_text(tokens, 0.0) is tokens
    with pytest.raises(ValueError, match="drop_text is 1"):
        text_diffusion_loss(lambda *a, **b: None, SCHEDULE, images(), TOKENS, drop_text=1)


def test_an_upsampler_is_given_means_of_squares_and_a_painter_a_hole():
    x0 = images(side=16)
    model = Recording(x0.double())
    text_diffusion_loss(model, SCHEDULE, x0, TOKENS, scale=4, inpaint=True)
    options = model.calls[0][2]
    assert torch.allclose(options["low_res"][:, :, 0, 1], x0[:, :, :4, 4:8].mean((2, 3)), atol=1e-6)
    mask = options["inpaint_mask"]
    assert mask.shape == (16, 1, 16, 16) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert options["inpaint_image"] is x0


def test_holes_are_rectangles_of_many_sizes():
    masks = random_holes(torch.zeros(400, 3, 16, 20), generator=torch.Generator().manual_seed(0))[:, 0]
    empty = masks.flatten(1).sum(1) == 0
    assert 0.2 < empty.double().mean() < 0.35
    for hole in 1 - masks[~empty]:
        rows, columns = hole.amax(1).sum(), hole.amax(0).sum()
        assert hole.sum() == rows * columns and rows >= 4 and columns >= 5
    assert len({int(mask.sum()) for mask in masks}) > 50
