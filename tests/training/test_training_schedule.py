"""Learning rate, weight decay groups and the average of the weights."""

import pytest
import torch
from training_helpers import tiny_model

from vlmfast.training import TrainConfig, learning_rate
from vlmfast.training.schedule import WeightAverage, make_optimizer, parameter_groups


def test_warms_up_linearly_and_ends_as_a_cosine():
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half way
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.101


def test_short_runs_have_a_rate():
    assert learning_rate(0, 1, TrainConfig(lr=1.0)) == 1.0
    with pytest.raises(ValueError, match="step is 1"):
        learning_rate(1, 1, TrainConfig())


@pytest.mark.parametrize("resnet", [False, True])
def test_norms_biases_and_temperature_do_not_decay(resnet):
    model = tiny_model(resnet=resnet, init_logit_bias=-1.0)
    decay, rest = parameter_groups(model, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    kept = {names[id(parameter)] for parameter in rest["params"]}
    assert {"logit_scale", "logit_bias", "ln_final.weight", "ln_final.bias"} <= kept
    assert not any(name.endswith("bias") or ".ln" in name or ".bn" in name
                   for name in (names[id(parameter)] for parameter in decay["params"]))
    assert len(kept) + len(decay["params"]) == len(names)


def test_frozen_parameters_stay_out():
    model = tiny_model()
    model.visual.requires_grad_(False)
    frozen = {id(parameter) for parameter in model.visual.parameters()}
    trained = {id(p) for group in make_optimizer(model, TrainConfig()).param_groups for p in group["params"]}
    assert trained and not trained & frozen
    with pytest.raises(ValueError, match="no parameter"):
        parameter_groups(model.requires_grad_(False), 0.1)


def test_average_follows_the_weights():
    model = torch.nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    average.update(model)
    weight = 1 - 2 / 11  # early updates move faster than the decay says
    assert average.values["weight"].tolist() == pytest.approx([1 + 2 * weight] * 2)
    assert average.values["num_batches_tracked"] == 7
    for _ in range(60):
        average.update(model)
    assert average.values["weight"].tolist() == pytest.approx([3.0, 3.0])
