"""Time and peak memory of one call, for the table of the demo."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def cpu_seconds(calls: dict[str, Callable[[], object]], rounds: int = 15, budget: float = 4.0) -> dict[str, float]:
    """Median process CPU seconds of each call, interleaved so that all meet the same weather; one call warms up."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    for done in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
        if done >= 2 and time.perf_counter() > end:
            break
    return {name: statistics.median(values) for name, values in taken.items()}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak_rise(call: Callable[[], object]) -> int | None:
    """Bytes by which resident memory rises above its level during the call, results included.

    None where the system offers no high-water mark that can be reset (not Linux, or a restricted container).
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed earlier hides what the call takes
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmHWM")
        result = call()
        peak = _status("VmHWM")
    except (OSError, AttributeError):
        return None
    del result
    return max(0, peak - before)
