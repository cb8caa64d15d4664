"""What the frozen config dataclasses share: plain dicts out and in, and checks that name the field."""

from dataclasses import asdict, fields

import torch
from torch import Tensor


class ModelConfig:
    """Base of a frozen dataclass of settings."""

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict):
        """Inverse of `to_dict`; raises ValueError on unknown fields."""
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {', '.join(unknown)}")
        return cls(**values)

    def check_numbers(self, from_zero: tuple[str, ...] = ()) -> None:
        """Every `int` field is at least 1 (0 for `from_zero`), every `bool` a bool, dropouts lie in [0, 1)."""
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            least = int(name not in from_zero)
            if entry.type is int and (type(value) is not int or value < least):
                self.refuse(name, f"an integer of at least {least}")
            if entry.type is bool and type(value) is not bool:
                self.refuse(name, "True or False")
            if entry.type is float and (type(value) not in (int, float) or not value >= 0):
                self.refuse(name, "a number of at least 0")
            if entry.type is float and "dropout" in name and value >= 1:
                self.refuse(name, "less than 1")

    def check_choice(self, name: str, allowed) -> None:
        if getattr(self, name) not in tuple(allowed):
            self.refuse(name, f"one of {list(allowed)}")

    def check_heads(self, width: str, heads: str) -> None:
        if getattr(self, width) % getattr(self, heads):
            self.refuse(heads, f"a divisor of {width}, {getattr(self, width)}")

    def refuse(self, name: str, must: str) -> None:
        raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}, must be {must}")


def check_ids(owner: str, name: str, ids: Tensor, size: int) -> None:
    """ValueError where ids on the CPU lie outside 0 ... size - 1; elsewhere looking would wait for the device."""
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        least, most = (int(x) for x in ids.aminmax())
        if least < 0 or most >= size:
            raise ValueError(f"{owner}: {name} holds {least if least < 0 else most}, must be in 0 ... {size - 1}")
