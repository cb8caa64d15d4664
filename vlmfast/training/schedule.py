"""Learning rate, parameter groups, average of the weights."""

import math

import torch
from torch import nn

from .config import TrainConfig


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `min_lr`; a pure function of the step, 0 = first.

    Raises:
        ValueError: step is outside [0, total).
    """
    if not 0 <= step < total:
        raise ValueError(f"learning_rate: step is {step}, must be in [0, {total})")
    warmup = int(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay; vectors and scalars (norms, biases, class embedding, logit_scale, logit_bias) do not.

    Raises:
        ValueError: the model has no parameter to train.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("parameter_groups: model has no parameter that requires a gradient")
    decay = [parameter for parameter in trained if parameter.ndim >= 2]
    rest = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101); one fused pass over the parameters where the device has it."""
    groups = parameter_groups(model, config.weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


class WeightAverage:
    """Exponential moving average of weights and floating-point buffers, with a quick start.

    Args:
        model: copied now.
        decay: of the average in the long run; update t uses min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the present weights; integer buffers are copied."""
        self.updates += 1
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = model.state_dict()
        floating = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in floating], [current[name] for name in floating], weight)
        for name in current.keys() - set(floating):
            self.values[name].copy_(current[name])

    def state_dict(self) -> dict:
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])
