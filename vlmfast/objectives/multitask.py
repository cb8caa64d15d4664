"""Learning several tasks at once: which task comes next, when one has learned enough, and their heads and losses."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STRATEGIES = ("proportional", "temperature", "annealed", "round_robin")
ANNEAL = 0.8  # how far the exponent of sizes falls


class TaskSampler:
    """Draws the task of each step.

    ============ =================================================================================
    proportional p ~ size; with the ratios of a paper as sizes (UNITER: itm 2, mlm 2, mrfr 1, mrc_kl 1)
    temperature  p ~ size^(1 / temperature) (multilingual BERT, T5)
    annealed     p ~ size^a, a from 1 to 0.2 over total_steps (Stickland and Murray, arXiv:1902.02671)
    round_robin  every task once, in order (12-in-1, arXiv:1912.02315)
    ============ =================================================================================

    Args:
        sizes: examples of each task, or any positive weights.
        strategy, temperature, total_steps: see the table.
        seed: of the draws; the same seed gives the same tasks.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(self, sizes: Mapping[str, float], strategy: str = "proportional", *, temperature: float = 2.0,
                 total_steps: int | None = None, seed: int = 0):
        if not sizes or min(sizes.values()) <= 0:
            raise ValueError(f"TaskSampler: sizes are {dict(sizes)}, must be positive, of at least one task")
        if strategy not in STRATEGIES:
            raise ValueError(f"TaskSampler: strategy is {strategy!r}, must be one of {', '.join(STRATEGIES)}")
        if not temperature > 0:
            raise ValueError(f"TaskSampler: temperature is {temperature}, must be positive")
        if strategy == "annealed" and (total_steps is None or total_steps < 1):
            raise ValueError(f"TaskSampler: total_steps is {total_steps}, must be at least 1 for 'annealed'")
        self.sizes, self.strategy, self.temperature = dict(sizes), strategy, temperature
        self.total_steps, self.step = total_steps, 0
        self.generator = torch.Generator().manual_seed(seed)

    def probabilities(self, step: int | None = None) -> dict[str, float]:
        """Probability of each task at a step, by default the next one; round robin: 1 for the one whose turn it is."""
        step, names = self.step if step is None else step, list(self.sizes)
        if self.strategy == "round_robin":
            return {name: float(i == step % len(names)) for i, name in enumerate(names)}
        power = 1.0
        if self.strategy == "temperature":
            power = 1 / self.temperature
        elif self.strategy == "annealed":
            power = 1 - ANNEAL * min(step / max(self.total_steps - 1, 1), 1.0)
        weights = torch.tensor([self.sizes[name] for name in names], dtype=torch.float64).log().mul(power).softmax(0)
        return dict(zip(names, weights.tolist(), strict=True))

    def next(self) -> str:
        """The task of this step; moves on."""
        chances = self.probabilities()
        self.step += 1
        if self.strategy == "round_robin":
            return max(chances, key=chances.get)
        index = torch.multinomial(torch.tensor(list(chances.values()), dtype=torch.float64), 1,
                                  generator=self.generator)
        return list(chances)[int(index)]

    def __iter__(self) -> Iterator[str]:
        while True:
            yield self.next()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self.generator.set_state(state["generator"])


@dataclass
class Progress:
    """What `StopAndGo` keeps of a task: checks without improvement, checks that are not counted."""

    best: float = -float("inf")
    bad_checks: int = 0
    cooldown: int = 0
    stopped: bool = False


class StopAndGo:
    """Dynamic stop-and-go: a task that has stopped improving runs rarely, until it gets worse.

    Args:
        tasks: names.
        improvement: relative gain over the best score that counts.
        patience: checks without it that are allowed; one more stops the task.
        drop: relative loss against the best score at which a stopped task goes on.
        gap: a stopped task still runs every so many steps.
        cooldown: checks after a stop or a go that are not counted as bad.

    Source: 12-in-1 (Lu et al. 2020, arXiv:1912.02315), sec. 3.4, and its public code.
    """

    def __init__(self, tasks, *, improvement: float = 0.001, patience: int = 1, drop: float = 0.005, gap: int = 4,
                 cooldown: int = 1):
        if gap < 1:
            raise ValueError(f"StopAndGo: gap is {gap}, must be at least 1")
        self.improvement, self.patience, self.drop, self.gap, self.cooldown = improvement, patience, drop, gap, cooldown
        self.tasks = {name: Progress() for name in tasks}

    def update(self, task: str, score: float) -> bool:
        """After a check of a task on held-out data, higher is better; returns whether it is stopped now."""
        state = self._state(task)
        margin = abs(state.best) if state.best > -float("inf") else 0.0
        if score > state.best + self.improvement * margin:
            state.best, state.bad_checks = score, 0
        else:
            state.bad_checks += 1
        if state.cooldown:
            state.cooldown, state.bad_checks = state.cooldown - 1, 0
        if state.stopped and score < state.best - self.drop * margin:
            state.stopped, state.bad_checks, state.cooldown = False, 0, self.cooldown
        elif not state.stopped and state.bad_checks > self.patience:
            state.stopped, state.bad_checks, state.cooldown = True, 0, self.cooldown
        return state.stopped

    def runs(self, task: str, step: int) -> bool:
        """Whether a task takes part in this global step."""
        return not self._state(task).stopped or step % self.gap == 0

    def active(self, step: int) -> list[str]:
        """The tasks of this global step, in their fixed order."""
        return [name for name in self.tasks if self.runs(name, step)]

    def reset(self) -> None:
        """Forgets bad checks, as when the learning rate drops."""
        for state in self.tasks.values():
            state.bad_checks = state.cooldown = 0

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {name: dict(vars(state)) for name, state in self.tasks.items()}

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        if set(states) != set(self.tasks):
            raise ValueError(f"StopAndGo: the state has tasks {sorted(states)}, must have {sorted(self.tasks)}")
        self.tasks = {name: Progress(**states[name]) for name in self.tasks}

    def _state(self, task: str) -> Progress:
        if task not in self.tasks:
            raise ValueError(f"StopAndGo: unknown task {task!r}, must be one of {', '.join(self.tasks)}")
        return self.tasks[task]


def fused(output) -> Tensor:
    """[B, P] one vector a pair: the pooled one, or the product of the pooled streams (ViLBERT)."""
    pooled = getattr(output, "pooled", None)
    return output.pooled_text * output.pooled_image if pooled is None else pooled


@dataclass
class Task:
    """One task on a shared trunk.

    Attributes:
        loss: function of (logits, target) -> [].
        head: module from `features(output)` to logits; or
        head_name: one of the trunk's own heads.
        weight: factor of the loss.
        features: what the head reads of the trunk's output.
    """

    loss: Callable[[Tensor, Any], Tensor]
    head: nn.Module | None = None
    head_name: str | None = None
    weight: float = 1.0
    features: Callable[[Any], Tensor] = fused


class MultiTask(nn.Module):
    """A trunk and its tasks. Each task's own head is a parameter group under `heads.<task>`.

    Args:
        trunk: a model as in `models`.
        tasks: by name, without dots.

    Raises:
        ValueError: a task with both or neither of head and head_name, or a name that the trunk does not have.
    """

    def __init__(self, trunk: nn.Module, tasks: Mapping[str, Task]):
        super().__init__()
        for name, task in tasks.items():
            if (task.head is None) == (task.head_name is None):
                raise ValueError(f"MultiTask: task {name!r} must have one of head and head_name")
            if task.head_name is not None and task.head_name not in trunk.available():
                raise ValueError(f"MultiTask: task {name!r} has head_name {task.head_name!r}, the trunk has "
                                 f"{', '.join(trunk.available())}")
        self.trunk, self.tasks = trunk, dict(tasks)
        self.heads = nn.ModuleDict({name: task.head for name, task in tasks.items() if task.head is not None})

    def logits(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Scores of one task; `inputs` are the trunk's arguments by name."""
        if name not in self.tasks:
            raise ValueError(f"MultiTask: unknown task {name!r}, must be one of {', '.join(self.tasks)}")
        task = self.tasks[name]
        if task.head_name is not None:
            return self.trunk(**inputs, heads=(task.head_name,)).logits[task.head_name]
        return self.heads[name](task.features(self.trunk(**inputs, heads=())))

    def forward(self, name: str, inputs: Mapping[str, Tensor], target: Any) -> Tensor:
        """The weighted loss [] of one task's batch. 12-in-1 steps the optimiser after each task."""
        logits, task = self.logits(name, inputs), self.tasks[name]
        return task.weight * task.loss(logits, target)
