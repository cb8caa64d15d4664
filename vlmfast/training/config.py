"""Settings of a training run."""

from dataclasses import asdict, dataclass, fields

AMP = ("none", "bf16", "fp16")
OBJECTIVES = ("clip", "siglip")


@dataclass(frozen=True)
class TrainConfig:
    """What decides a run beside model and loader; with equal ones, weights are equal bit for bit on one device.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = 10
    steps: int = 0  # optimizer steps in all; 0: as many as `epochs` take
    accumulate: int = 1  # chunks a batch is encoded in; memory falls, the loss stays that of the whole batch
    lr: float = 5e-4
    min_lr: float = 0.0  # where the cosine ends
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.2  # on matrices; never on norms, biases, embeddings of one row, temperature
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    max_grad_norm: float = 1.0  # 0: no clipping
    amp: str = "none"  # none, bf16, or fp16 (CUDA, with loss scaling)
    objective: str = "clip"  # or siglip
    label_smoothing: float = 0.0  # clip only
    ema: float = 0.0  # decay of an average of the weights, which is then what is validated and saved; 0: none
    seed: int = 0
    save_every: int = 0  # steps between checkpoints within an epoch; one is always written after each epoch
    log_every: int = 1  # steps between lines of the log

    def __post_init__(self):
        def check(condition: bool, name: str, must: str) -> None:
            if not condition:
                raise ValueError(f"TrainConfig: {name} is {getattr(self, name)!r}, must be {must}")

        for name in ("epochs", "accumulate", "log_every"):
            value = getattr(self, name)
            check(isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, "a positive integer")
        for name in ("steps", "seed", "save_every"):
            check(isinstance(getattr(self, name), int) and getattr(self, name) >= 0, name, "an integer, 0 or more")
        check(0 < self.lr < float("inf"), "lr", "positive")
        check(0 <= self.min_lr <= self.lr, "min_lr", f"between 0 and lr ({self.lr})")
        check(0 <= self.warmup < 1, "warmup", "in [0, 1), a share of all steps")
        check(0 <= self.weight_decay < float("inf"), "weight_decay", "0 or more")
        for name in ("beta1", "beta2", "ema", "label_smoothing"):
            check(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        check(self.eps > 0, "eps", "positive")
        check(self.max_grad_norm >= 0, "max_grad_norm", "0 or more")
        check(self.amp in AMP, "amp", f"one of {', '.join(AMP)}")
        check(self.objective in OBJECTIVES, "objective", f"one of {', '.join(OBJECTIVES)}")
        check(self.objective == "clip" or not self.label_smoothing, "label_smoothing", "0 with objective siglip")

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Inverse of `to_dict`; raises ValueError on unknown fields."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"TrainConfig: unknown fields {', '.join(unknown)}")
        return cls(**values)
