"""A batch encoded in chunks has the loss and the gradients of the whole batch."""

import pytest
import torch
from training_helpers import tiny_batch, tiny_model

from vlmfast.training.contrastive import Objective, accumulate_gradient, chunk_sizes

MEAN = 0.5


def gradients(model, chunks, objective=None, count=13, **options):
    images, tokens = tiny_batch(count)
    images = images.to(model.logit_scale.dtype) / 255 - MEAN
    model.zero_grad()
    torch.manual_seed(7)
    loss, accuracy = accumulate_gradient(model, images, tokens, objective or Objective(), chunks, **options)
    return loss, accuracy, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunks", [2, 3, 13, 40])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunks_give_the_gradient_of_the_whole_batch(chunks, smoothing):
    model = tiny_model().double()
    objective = Objective(label_smoothing=smoothing)
    loss, accuracy, whole = gradients(model, 1, objective)
    chunked_loss, chunked_accuracy, chunked = gradients(model, chunks, objective)
    assert chunked_accuracy == pytest.approx(accuracy)
    assert chunked_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient"
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_siglip_chunks_include_the_bias():
    model = tiny_model(init_logit_bias=-3.0).double()
    objective = Objective("siglip")
    _, _, whole = gradients(model, 1, objective)
    _, _, chunked = gradients(model, 4, objective)
    assert whole["logit_bias"].abs() > 0
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-10, atol=1e-12)


def test_the_loss_is_not_the_mean_of_the_chunks_losses():
    model = tiny_model().double()
    images, tokens = tiny_batch(12)
    images = images.double() / 255 - MEAN
    whole, _ = accumulate_gradient(model, images, tokens, Objective(), 3)
    chunks = zip(images.split(4), tokens.split(4), strict=True)
    parts = [accumulate_gradient(model, *chunk, Objective())[0] for chunk in chunks]
    assert whole > sum(parts) / 3 + 0.1


def test_second_pass_repeats_the_dropout_of_the_first():
    model = tiny_model(dropout=0.5).double()
    images, tokens = tiny_batch(6)
    images = images.double() / 255 - MEAN
    torch.manual_seed(3)
    model.zero_grad()
    accumulate_gradient(model, images, tokens, Objective(), 2)
    chunked = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    model.zero_grad()
    # the same two draws of dropout masks, in one graph
    outs = [model(i, t) for i, t in zip(images.split(3), tokens.split(3), strict=True)]
    features = [torch.cat([out[k] for out in outs]) for k in (0, 1)]
    Objective()(*features, outs[0].logit_scale, None)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_running_statistics_see_each_chunk_once():
    model = tiny_model(resnet=True).double().train()
    gradients(model, 3)
    assert model.visual.bn1.num_batches_tracked == 3


def test_loss_factor_scales_gradients_but_not_the_loss():
    model = tiny_model().double()
    loss, _, plain = gradients(model, 2)
    scaled_loss, _, scaled = gradients(model, 2, loss_factor=8.0)
    assert scaled_loss == loss
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name], 8 * gradient, rtol=1e-10, atol=1e-14)


def test_chunk_sizes_cover_the_batch():
    assert chunk_sizes(13, 4) == [4, 3, 3, 3]
    assert chunk_sizes(2, 5) == [1, 1]
