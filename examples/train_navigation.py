"""An agent that follows instructions in BabyAI's rooms, trained by imitating BabyAI's own bot.

    pip install minigrid
    python examples/train_navigation.py --out navigator/

Minutes on one core. The level is one room with several objects and an instruction like "go to the red ball"; the agent
sees the objects in the 7 x 7 cells before it, as kinds and colours, not pixels. Rooms are drawn at random and the
language is a handful of templates: nothing here says how the agent does in buildings. Rooms of training and those
measured on have different seeds.

A success is what the environment calls one: facing an object that is meant, within `--moves` steps; it then ends the
episode, so that chance meetings count for every walker. SPL counts each action as a step, against the shortest way.
Baselines: an agent with the same training whose instructions are all the same ("blind"), and one that draws its moves.

Written to the output folder: the agent (a checkpoint), result.json, result.md and walk.gif, one held-out walk.
"""

import argparse
import contextlib
import io
import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from vlmfast.checkpoints import save_pretrained
from vlmfast.data import WordPieceTokenizer
from vlmfast.models import create
from vlmfast.tasks import (
    Demonstration,
    Navigator,
    Observation,
    Trajectory,
    navigation_loss,
    navigation_scores,
    paired_bootstrap,
)

LEVEL, HELD_OUT, BLIND = "BabyAI-GoToLocal-v0", 1_000_000, "go there"
ACTIONS = 3  # minigrid's left, right and forward
KINDS, COLORS, EMPTY, WALL = 11, 6, 1, 2
FEATURES, PLACE = KINDS + COLORS, 4
AHEAD = ((1, 0), (0, 1), (-1, 0), (0, -1))  # minigrid's directions
REACHED = "facing what is meant"


class Room:
    """One episode; `seed` draws the room and the instruction."""

    def __init__(self, level: str, seed: int, moves: int):
        import gymnasium
        import minigrid  # noqa: F401  registers the levels

        with contextlib.redirect_stdout(io.StringIO()):  # messages about rooms that it draws again
            self.env = gymnasium.make(level, max_steps=moves)
            self.seen, _ = self.env.reset(seed=seed)
        self.grid, self.done, self.success = self.env.unwrapped, False, False
        self.instruction, self.steps = self.seen["mission"], 0
        targets = {tuple(map(int, place)) for place in self.grid.instrs.desc.obj_poss}
        self.shortest = self._shortest(targets)

    def observe(self) -> Observation:
        """Objects in view, then the cell ahead: kind and colour, with side, distance and whether it is ahead."""
        cells = torch.from_numpy(self.seen["image"]).long()  # [7, 7, 3], the agent in the middle of the last column
        width, depth = cells.shape[:2]
        keep = cells[..., 0] > WALL
        keep[width // 2, depth - 2] = True
        x, y = keep.nonzero(as_tuple=True)
        kind, color = cells[x, y, 0], cells[x, y, 1]
        side, distance = (x - width // 2).float(), (depth - 1 - y).float()
        ahead = (side == 0) & (distance == 1)
        place = torch.stack([side / 3, distance / 6, (side == 0).float(), ahead.float()], 1)
        return Observation(torch.cat([F.one_hot(kind, KINDS), F.one_hot(color, COLORS)], 1).float(), place)

    def act(self, choice: int) -> None:
        self.seen, reward, ended, cut, _ = self.env.step(choice)
        self.steps += 1
        self.done, self.success = ended or cut, ended and reward > 0

    def trajectory(self) -> Trajectory:
        """In steps: places are how many have been made, and the goal where the environment called it a success."""
        def distance(a, b):
            if b != REACHED:
                return abs(a - b)
            return self.shortest if a == 0 else 0.0 if self.success and a == self.steps else 1.0

        return Trajectory(range(self.steps + 1), REACHED, distance)

    def _shortest(self, targets: set) -> float:
        """Actions from here until the agent faces a target."""
        start = (*map(int, self.grid.agent_pos), int(self.grid.agent_dir))
        queue, known = deque([(start, 0)]), {start}
        while queue:
            (x, y, d), steps = queue.popleft()
            ahead = x + AHEAD[d][0], y + AHEAD[d][1]
            if ahead in targets:
                return float(max(steps, 1))  # the environment looks after an action
            cell = self.grid.grid.get(*ahead)
            found = [(x, y, (d - 1) % 4), (x, y, (d + 1) % 4)] + ([(*ahead, d)] if cell is None else [])
            for there in found:
                if there not in known:
                    known.add(there)
                    queue.append((there, steps + 1))
        return float("inf")


def reachable(level: str, seed: int, moves: int) -> Room | None:
    """The room; None where other objects bar the way, so that walking alone does not do."""
    room = Room(level, seed, moves)
    return room if np.isfinite(room.shortest) else None


def demonstrations(level: str, count: int, seed: int, moves: int, progress: bool) -> list[Demonstration]:
    """What the bot does in rooms from `seed` on, where turning and walking are all it does."""
    from minigrid.utils.baby_ai_bot import BabyAIBot

    found = []
    with tqdm(total=count, desc="demonstrations", disable=not progress) as bar:
        while len(found) < count:
            room, seed = Room(level, seed, moves), seed + 1
            bot, seen, choices = BabyAIBot(room.env), [], []
            while not room.done:
                action = int(bot.replan(choices[-1] if choices else None))
                if action >= ACTIONS:
                    break
                seen.append(room.observe())
                choices.append(action)
                room.act(action)
            if room.success:
                found.append(Demonstration(room.instruction, seen, choices))
                bar.update()
    return found


def train(agent: Navigator, shown: Sequence[Demonstration], steps: int, lr: float, seed: int, progress: bool,
          batch_size: int = 64) -> None:
    """Imitation; batches of episodes of like length."""
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(shown)), key=lambda i: len(shown[i].choices))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    optimizer = torch.optim.AdamW(agent.model.train().parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)
    bar = tqdm(range(steps), desc="training", disable=not progress)
    for _ in bar:
        rows = batches[int(torch.randint(len(batches), (), generator=generator))]
        loss = navigation_loss(agent.model, agent.batch([shown[i] for i in rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    agent.model.eval()


def figures(rooms: Sequence[Room]) -> dict:
    """Success rate and SPL with their standard errors."""
    trajectories = [room.trajectory() for room in rooms]
    own = navigation_scores(trajectories, threshold=0, inclusive=True)
    each = np.array([navigation_scores([one], threshold=0, inclusive=True).spl for one in trajectories])
    return {"success_rate": own.success_rate, "success_standard_error": own.success_standard_error, "spl": own.spl,
            "spl_standard_error": float(each.std() / len(each) ** 0.5), "steps": own.trajectory_length}  # fmt: skip


def run(out: Path, *, level: str = LEVEL, rooms: int = 2000, test: int = 300, steps: int = 600, lr: float = 2e-3,
        moves: int = 40, seed: int = 0, progress: bool = True) -> dict:
    """Trains, walks through the held-out rooms, writes the folder; returns what `result.json` holds."""
    started = time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    shown = demonstrations(level, rooms, seed * HELD_OUT // 100, moves, progress)
    tokenizer = WordPieceTokenizer.train([one.instruction for one in shown] + [BLIND], 200, max_length=32)
    seeds = [i for i in range(HELD_OUT, HELD_OUT + 2 * test) if reachable(level, i, moves)][:test]
    walked = {}
    for name in ("agent", "blind"):
        torch.manual_seed(seed)
        model = create("vlnbert-tiny", vocab_size=tokenizer.vocab_size, image_feat_dim=FEATURES, image_loc_dim=PLACE,
                       actions=ACTIONS, initializer_range=0.1)
        agent = Navigator(model, tokenizer=tokenizer)
        own = shown if name == "agent" else [Demonstration(BLIND, one.observations, one.choices) for one in shown]
        train(agent, own, steps, lr, seed, progress)
        walked[name] = [Room(level, i, moves) for i in seeds]
        agent.run([BLIND if name == "blind" else room.instruction for room in walked[name]], walked[name],
                  max_steps=moves)
        if name == "agent":
            model.tokenizer = tokenizer
            save_pretrained(model, out)
            animate(agent, level, seeds, walked[name], moves, out / "walk.gif")
    chance = np.random.default_rng(seed)
    walked["random"] = [Room(level, i, moves) for i in seeds]
    for room in walked["random"]:
        while not room.done:
            room.act(int(chance.integers(ACTIONS)))
    hits = {name: np.array([room.success for room in own], dtype=float) for name, own in walked.items()}
    result = {
        "level": level, "demonstrations": rooms, "held_out": len(seeds), "steps": steps, "seed": seed,
        "cpu_seconds": round(time.process_time() - started, 1),
        "scores": {name: figures(own) for name, own in walked.items()}, "agent_minus": {},
    }  # fmt: skip
    for name in ("blind", "random"):
        own = paired_bootstrap(lambda rows: float(hits["agent"][rows].mean()),
                               lambda rows, name=name: float(hits[name][rows].mean()), len(seeds))
        result["agent_minus"][name] = {"difference": own.value, "standard_error": own.standard_error,
                                       "standard_errors": own.errors_above}  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "result.md").write_text(table(result), encoding="utf-8")
    return result


def animate(agent: Navigator, level: str, seeds: Sequence[int], rooms: Sequence[Room], moves: int, path: Path) -> None:
    """The longest successful of the first walks."""
    from PIL import Image

    chosen = max(range(min(30, len(rooms))), key=lambda i: (rooms[i].success, rooms[i].steps))
    room, frames = Room(level, seeds[chosen], moves), []
    act = room.act

    def filmed(choice: int) -> None:
        act(choice)
        frames.append(Image.fromarray(room.grid.get_frame(tile_size=24)))

    frames.append(Image.fromarray(room.grid.get_frame(tile_size=24)))
    room.act = filmed
    agent.run([room.instruction], [room], max_steps=moves)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=400, loop=0,
                   comment=room.instruction.encode())


def table(result: dict) -> str:
    """Markdown."""
    lines = [f"{result['level']}: {result['held_out']} held-out rooms, {result['demonstrations']} demonstrations, "
             f"{result['steps']} steps, {result['cpu_seconds']:.0f} s of CPU in all.", "",
             "| walker | success | SPL | steps | agent minus it |", "|---|---|---|---|---|"]  # fmt: skip
    for name, own in result["scores"].items():
        other = result["agent_minus"].get(name)
        ahead = "" if other is None else (f"{other['difference']:+.3f} ± {other['standard_error']:.3f} "
                                          f"({other['standard_errors']:.1f} se)")
        lines.append(f"| {name} | {own['success_rate']:.3f} ± {own['success_standard_error']:.3f} | {own['spl']:.3f} "
                     f"± {own['spl_standard_error']:.3f} | {own['steps']:.1f} | {ahead} |")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--level", default=LEVEL, help=f"a BabyAI level of going to an object ({LEVEL})")
    parser.add_argument("--rooms", type=int, default=2000, help="demonstrations to learn from")
    parser.add_argument("--test", type=int, default=300, help="held-out rooms")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--moves", type=int, default=40, help="actions after which an episode has failed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true")
    options = vars(parser.parse_args(arguments))
    progress = not options.pop("no_progress")
    print(table(run(**options, progress=progress)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
