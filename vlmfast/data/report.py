"""What a data set used and what it left out, with reasons."""

from collections import Counter
from dataclasses import dataclass, field

EXAMPLES = 5


@dataclass(frozen=True)
class Skip:
    """Something that was left out: why, where it stands, and what exactly was wrong."""

    reason: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}" if self.detail else self.where


@dataclass
class PairsReport:
    """Counts of pairs used and skipped.

    Attributes:
        used: pairs that came out, or can.
        skipped: reason -> count.
        examples: reason -> the first few places.
    """

    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, skip: Skip) -> None:
        self.skipped[skip.reason] += 1
        places = self.examples.setdefault(skip.reason, [])
        if len(places) < EXAMPLES:
            places.append(str(skip))

    @property
    def total_skipped(self) -> int:
        return sum(self.skipped.values())

    def __str__(self) -> str:
        lines = [f"{self.used} pairs used, {self.total_skipped} skipped"]
        for reason, count in self.skipped.most_common():
            lines.append(f"  {count} {reason}, for example {'; '.join(self.examples[reason])}")
        return "\n".join(lines)
