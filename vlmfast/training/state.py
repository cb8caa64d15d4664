"""Checkpoints of a run: what is needed to go on bit for bit, written so that a crash leaves the last one whole."""

import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

STATE_NAME = "training_state.pt"


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the run stopped before the weights took it in."""


def random_states(device: torch.device) -> dict:
    """States of Python's, numpy's and torch's generators in plain types, so that loading them executes nothing."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: dict, device: torch.device) -> None:
    """Inverse of `random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_everything(seed: int, rank: int) -> None:
    """Seeds all generators; layers that draw (dropout) draw differently on each rank."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def gather_random_states(device: torch.device) -> list[dict]:
    """The states of all ranks, in rank order."""
    states = random_states(device)
    if not dist.is_initialized():
        return [states]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, states)
    return gathered


def write_state(folder: Path, state: dict) -> None:
    """Writes `training_state.pt` under another name first: whatever happens, the old or the new one is there whole."""
    partial = folder / (STATE_NAME + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / STATE_NAME)


def read_state(folder: Path) -> dict:
    """Reads it back on the CPU.

    Raises:
        FileNotFoundError: the folder holds none. ValueError: it is damaged or no training state.
    """
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"resume: {folder} holds no {STATE_NAME}; nothing was saved there yet")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise half a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"resume: {path} cannot be read ({reason})") from error
    wanted = {"step", "config", "model", "optimizer", "random", "data"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise ValueError(f"resume: {path} is no training state of vlmfast")
    return state
