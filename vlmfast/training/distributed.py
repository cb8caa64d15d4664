"""Processes started by `torchrun`: who am I, which device is mine, which library connects us."""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """This process among `world`; without `torchrun` the only one."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """The one that logs and saves."""
        return self.rank == 0

    @property
    def group(self):
        """All processes, or None where there is one."""
        return dist.group.WORLD if self.world > 1 else None


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, must be cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise ValueError(f"device is {name!r}, PyTorch finds {torch.cuda.device_count()} GPUs")
    return device


def this_process(device: torch.device | str | None = None) -> Process:
    """The process as torch.distributed knows it, if it is initialised."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if dist.is_available() and dist.is_initialized():
        return Process(device, dist.get_rank(), dist.get_world_size())
    return Process(device)


@contextmanager
def torchrun(device: str | None = None):
    """Joins the processes that `torchrun` started (RANK and WORLD_SIZE are set), or runs alone; yields a `Process`.

    Args:
        device: "cpu", "cuda", or None for CUDA where there is a GPU for each local process.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        device = "cuda" if enough else "cpu"
    check_device(device)
    if device == "cuda":
        torch.cuda.set_device(local)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield this_process(device)
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield this_process(device)
    finally:
        dist.destroy_process_group()
