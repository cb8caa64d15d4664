"""Peak memory of one call, and what autograd keeps for the backward."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def _status(key: str) -> int:
    """A size from /proc/self/status in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _release_freed() -> None:
    """Hands freed heap pages back, so that a call cannot hide its memory in what an earlier one left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_rise(call: Callable[[], object], device: str = "cpu") -> int | None:
    """How far resident memory (CUDA: allocated memory) rises above its level before the call, in bytes.

    Counts the results, too. None where the kernel offers no way to reset the high-water mark.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _release_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present VmRSS
        before = _status("VmHWM")
    except OSError:
        return None
    result = call()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the distinct storages autograd saves during `forward`, inputs among them."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # keeps the storage, so that no later one gets its address; drops the graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    del outputs
    return sum(storages.values())


def available_bytes(device: str = "cpu") -> int:
    """Memory a new allocation may still take."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return sys.maxsize


def fresh_process_peak(family: str, workload, peer: str, timeout_s: float = 900) -> int:
    """`peak_rise` of one forward and backward in a new process, where no earlier call has left buffers behind.

    Raises:
        RuntimeError: the process failed, with the last line it wrote.
    """
    request = [family, workload.op, workload.size, workload.dtype, workload.device, str(workload.threads), peer]
    command = [sys.executable, "-m", "bench.memory", *request]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise RuntimeError(f"{peer} at {workload}: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_extra_bytes"]


def _child(argv: list[str] | None = None) -> None:
    from .harness import Step, Workload

    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    for name in ("family", "op", "shape", "dtype", "device", "threads", "peer"):
        parser.add_argument(name)
    args = parser.parse_args(argv)
    family = importlib.import_module(f"bench.{args.family}")
    shape = tuple(map(int, args.shape.split("x")))
    workload = Workload(args.op, shape, args.dtype, args.device, int(args.threads))
    torch.set_num_threads(workload.threads)
    peer = next((p for p in family.peers(workload) if p.name == args.peer), None)
    if peer is None:
        raise SystemExit(f"no such peer: {args.peer!r}")
    if peer.skip:
        raise SystemExit(f"{peer.name}: {peer.skip}")
    # a small call first: library code and thread pools are paid once a process, not once a call
    small = replace(workload, shape=(min(64, shape[0]), *shape[1:]))
    Step(peer.make(small), family.inputs(small))()
    step = Step(peer.make(workload), family.inputs(workload))
    before, mark = _status("VmRSS"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rise = peak_rise(step, workload.device)
    if rise is None:  # the mark was not reset: its rise counts from the present level only if it moved at all
        step()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rise = after - before if after > mark else 0
    print(json.dumps({"peak_extra_bytes": rise}))


if __name__ == "__main__":
    _child()
