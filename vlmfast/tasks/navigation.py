"""Vision-language navigation: an instruction and what is seen, step by step, to what is done.

An environment is anything with `observe() -> Observation`, `act(choice)` and `done`; see `RouteWalk` for R2R's graphs.
The simulator's pictures are not part of this package: features are given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.annotations.r2r import NavigationGraph, RouteInstruction
from ..models.vlnbert import STOP, VLNBERT, VLNBERTState
from .fine_tuning import TaskBatch
from .navigation_metrics import Trajectory
from .pair_inputs import evaluating


class Observation(NamedTuple):
    """Rows that are seen: feat [R, D], and where they are, loc [R, L] or None."""

    feat: Tensor
    loc: Tensor | None = None


class Environment(Protocol):
    """One episode."""

    done: bool

    def observe(self) -> Observation: ...

    def act(self, choice: int) -> None:
        """0 stops and k walks to view k - 1; or the number of a fixed action."""


@dataclass(frozen=True)
class Demonstration:
    """An instruction and what was seen and done at each step."""

    instruction: str
    observations: Sequence[Observation]
    choices: Sequence[int]


class Navigator:
    """Follows instructions.

    Args:
        model: a `VLNBERT`.
        tokenizer: None takes `model.tokenizer`.

    Raises:
        TypeError: another model. ValueError: no tokenizer.
    """

    task = "navigation"

    def __init__(self, model: VLNBERT, *, tokenizer=None):
        if not isinstance(model, VLNBERT):
            raise TypeError(f"Navigator: model is {type(model).__name__}, must be a VLNBERT")
        self.model, self.tokenizer = model, tokenizer or model.tokenizer
        if self.tokenizer is None:
            raise ValueError("Navigator: the model carries no tokenizer, give one")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def run(self, instructions: Sequence[str], environments: Sequence[Environment], *, max_steps: int = 30,
            sample: torch.Generator | None = None) -> list[list[int]]:
        """Acts in all environments until each is done.

        Args:
            instructions, environments: B of each.
            max_steps: after which an episode is left as it is.
            sample: draws from the scores' distribution; None takes the best.

        Returns:
            The choices of each episode.

        Raises:
            ValueError: unequal numbers.
        """
        if len(instructions) != len(environments) or not len(instructions):
            raise ValueError(f"Navigator: {len(instructions)} instructions and {len(environments)} environments, must "
                             "be as many and at least one")
        done: list[list[int]] = [[] for _ in environments]
        with evaluating(self.model):
            now = self.model.start(*self._tokens(instructions))
            for _ in range(max_steps):
                live = [i for i, one in enumerate(environments) if not one.done]
                if not live:
                    break
                rows = torch.tensor(live, device=self.device)
                own = VLNBERTState(*(part[rows] for part in now))
                scores, choices, state = self.model.step(own, **self._stacked([[environments[i].observe()]
                                                                              for i in live], flat=True))
                if sample is None:
                    chosen = scores.argmax(-1)
                else:
                    chosen = torch.multinomial(scores.softmax(-1), 1, generator=sample)[:, 0]
                own = self.model.advance(own, state, choices, chosen)
                now.state[rows] = own.state
                for i, choice in zip(live, chosen.tolist(), strict=True):
                    environments[i].act(choice)
                    done[i].append(choice)
        return done

    def scores(self, demonstrations: Sequence[Demonstration]) -> Tensor:
        """[B, L, K] scores along the demonstrations, float32 on the CPU."""
        with evaluating(self.model):
            return self.model(**self.batch(demonstrations).inputs).logits["action"].float().cpu()

    def batch(self, demonstrations: Sequence[Demonstration]) -> TaskBatch:
        """Demonstrations to learn from; the target [B, L] is -100 behind an episode's end.

        Raises:
            ValueError: no steps, unequal numbers of observations and choices, or a choice that does not exist.
        """
        for i, one in enumerate(demonstrations):
            if not one.choices or len(one.choices) != len(one.observations):
                raise ValueError(f"Navigator: demonstration {i} has {len(one.observations)} observations and "
                                 f"{len(one.choices)} choices, must be as many and at least one")
            for seen, choice in zip(one.observations, one.choices, strict=True):
                if not 0 <= choice < (self.model.config.actions or len(seen.feat) + 1):
                    raise ValueError(f"Navigator: choice {choice} of demonstration {i} does not exist")
        ids, lengths = self._tokens([one.instruction for one in demonstrations])
        longest = max(len(one.choices) for one in demonstrations)
        target = torch.full((len(demonstrations), longest), -100)
        for row, one in zip(target, demonstrations, strict=True):
            row[: len(one.choices)] = torch.tensor(one.choices)
        target = target.to(self.device)
        inputs = {"input_ids": ids, "text_lengths": lengths, "chosen": target,
                  **self._stacked([one.observations for one in demonstrations])}  # fmt: skip
        return TaskBatch(inputs, target)

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        longest = min(self.model.config.max_position_embeddings, self.tokenizer.max_length)
        tokens = self.tokenizer(list(texts), max_length=longest).to(self.device)
        return tokens.input_ids, tokens.lengths

    def _stacked(self, episodes: Sequence[Sequence[Observation]], flat: bool = False) -> dict[str, Tensor | None]:
        """Observations as [B, L, R, D], padded in steps and rows; `flat`: of the only step, [B, R, D]."""
        config = self.model.config
        steps, rows = max(map(len, episodes)), max(len(seen.feat) for episode in episodes for seen in episode)
        feat = torch.zeros(len(episodes), steps, rows, config.image_feat_dim)
        loc = torch.zeros(len(episodes), steps, rows, config.image_loc_dim) if config.image_loc_dim else None
        counts = torch.zeros(len(episodes), steps, dtype=torch.long)
        for b, episode in enumerate(episodes):
            for i, seen in enumerate(episode):
                counts[b, i] = len(seen.feat)
                feat[b, i, : len(seen.feat)] = seen.feat
                if loc is not None:
                    loc[b, i, : len(seen.feat)] = seen.loc
        found = {"image_feat": feat, "image_loc": loc, "num_regions": counts}
        if flat:
            found = {name: None if part is None else part[:, 0] for name, part in found.items()}
        return {name: part.to(self.device) for name, part in found.items() if part is not None}


def navigation_loss(model: VLNBERT, batch: TaskBatch) -> Tensor:
    """Cross-entropy to the teacher's choices, summed over steps, divided by the episodes; [] float32 or wider."""
    logits = model(**batch.inputs, heads=("action",)).logits["action"]
    total = F.cross_entropy(logits.float().flatten(0, 1), batch.target.flatten(), ignore_index=-100, reduction="sum")
    return total / len(batch)


class RouteWalk:
    """An episode of R2R on a building's graph: choose a neighbouring viewpoint or stop.

    Args:
        route: where it starts; its path is what `teacher` follows.
        graph: of the building.
        features: viewpoint -> [D], what a view towards it shows.

    Attributes:
        path: viewpoints so far. done: it has stopped.

    Raises:
        ValueError: the route starts at no viewpoint of the graph. KeyError: a viewpoint without features.
    """

    def __init__(self, route: RouteInstruction, graph: NavigationGraph, features: Mapping[str, Tensor]):
        if route.path[0] not in graph.positions:
            raise ValueError(f"RouteWalk: route {route.instruction_id} starts at {route.path[0]!r}, not in the graph")
        self.route, self.graph, self.features = route, graph, features
        self.path, self.heading, self.done = [route.path[0]], route.heading, False

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.graph.neighbours[self.path[-1]]

    def _direction(self, there: str) -> tuple[float, float]:
        """Heading, 0 = north and clockwise, and elevation of a viewpoint in radians."""
        x, y, z = (b - a for a, b in zip(self.graph.positions[self.path[-1]], self.graph.positions[there],
                                         strict=True))
        return math.atan2(x, y), math.atan2(z, math.hypot(x, y))

    def observe(self) -> Observation:
        rows = []
        for there in self.candidates:
            heading, elevation = self._direction(there)
            turn = heading - self.heading
            rows.append([math.sin(turn), math.cos(turn), math.sin(elevation), math.cos(elevation)])
        return Observation(torch.stack([self.features[there] for there in self.candidates]), torch.tensor(rows))

    def act(self, choice: int) -> None:
        if choice == STOP:
            self.done = True
        else:
            there = self.candidates[choice - 1]
            self.heading = self._direction(there)[0]
            self.path.append(there)

    def teacher(self) -> int:
        """The choice that follows the route; ValueError off it."""
        i = len(self.path)
        if tuple(self.path) != tuple(self.route.path[:i]):
            raise ValueError(f"RouteWalk: {self.path} has left route {self.route.instruction_id}")
        return STOP if i == len(self.route.path) else 1 + self.candidates.index(self.route.path[i])

    def demonstration(self) -> Demonstration:
        """What a walk along the route sees and does, from here on."""
        seen, choices = [], []
        while not self.done:
            seen.append(self.observe())
            choices.append(self.teacher())
            self.act(choices[-1])
        return Demonstration(self.route.instruction, seen, choices)

    def trajectory(self) -> Trajectory:
        return Trajectory(self.path, self.route.path[-1], self.graph.distance, self.route.path)
