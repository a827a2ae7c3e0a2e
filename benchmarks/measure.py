"""How everything here is timed: alternatives take turns in one process, and ratios are of their minima.

The speed of a shared machine drifts by a factor of two, so absolute times are never compared between runs.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pycse.kernels import native

T = TypeVar("T")
BATCH = 0.01  # seconds; short calls are timed in batches of about that
LONG = 0.2  # seconds; calls as long need no second look
RAISED = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184"


@dataclass
class Timing:
    """Seconds of one call, round by round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(median - minimum) / minimum: how noisy the machine was."""
        return self.median / self.best - 1


class Turns:
    """Calls that take turns, round after round; short ones come in batches.

    Args:
        calls: by name, each run before; a round goes through all of them, the first one last.
        timer: ``time.process_time`` leaves out what other processes take; only for calls on one thread.
    """

    def __init__(self, calls: dict[str, Callable[[], object]], timer: Callable[[], float] | None = None) -> None:
        self.first, *self.others = calls
        self.calls, self.timer = calls, timer or time.perf_counter
        self.timings = {name: Timing() for name in calls}
        self.batch = dict.fromkeys(calls, 1)
        self.turn_seconds: dict[str, float] = {}
        self.left: dict[str, int] = {}  # rounds that a slow call still takes part in
        for name in calls:
            seconds = self._time(name)
            if seconds < LONG:
                seconds = min(seconds, self._time(name))
            self.batch[name] = max(1, int(BATCH / seconds))
            self.turn_seconds[name] = seconds * self.batch[name]

    def plan(self, budget: float) -> int:
        """How many rounds fit in ``budget`` seconds, at least three. A call of a third of it takes part in one more at
        most: the first look at it counts too."""
        for name in self.others:
            if (seconds := self.turn_seconds[name]) > budget / 3:
                self.timings[name].seconds.append(seconds)
                self.left[name] = 1 if seconds < 10 else 0
        quick = sum(seconds for name, seconds in self.turn_seconds.items() if name not in self.left)
        slow = sum(self.turn_seconds[name] * left for name, left in self.left.items())
        return max(3, int((budget - slow) / quick))

    def run(self, name: str) -> None:
        call = self.calls[name]
        for _ in range(self.batch[name]):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def time_others(self) -> None:
        for name in self.others:
            if self.left.get(name, 1):
                self.timings[name].seconds.append(self._time(name))
            if name in self.left:
                self.left[name] = max(0, self.left[name] - 1)

    def time_first(self) -> None:
        self.timings[self.first].seconds.append(self._time(self.first))

    def _time(self, name: str) -> float:
        start = self.timer()
        self.run(name)
        return (self.timer() - start) / self.batch[name]


def interleaved(calls: dict[str, Callable[[], object]], budget: float = 10.0) -> dict[str, Timing]:
    """Each call in turn, round after round, for about ``budget`` seconds."""
    for call in calls.values():
        call()
    turns = Turns(calls)
    for _ in range(turns.plan(budget)):
        turns.time_others()
        turns.time_first()
    return turns.timings


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rose above its level before the call, at the highest.

    Linux: the kernel's high-water mark, reset before the call; elsewhere a sampling thread is not precise enough.
    On a GPU the allocator's own mark.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def status(name: str) -> int:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {name}")

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def in_new_process(call: Callable[..., T], *args: Any) -> T:
    """The result of a module's function, where no allocator remembers earlier work."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if context.get_start_method() == "forkserver":
        # Imported once, not for each process; what is not installed is passed over.
        losses = "sentence_transformers.sentence_transformer.losses"
        multiprocessing.set_forkserver_preload(["benchmarks.peers", losses])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(call, *args).result()


def available_memory() -> int:
    """Bytes that can be had without swapping; a large number where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62


def import_seconds() -> float:
    """Of pycse, beyond importing torch."""
    code = "import torch, time; t = time.perf_counter(); import pycse; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return min(float(run.stdout) for run in runs)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    name = "unknown processor"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        try:
            with open("/proc/cpuinfo") as file:
                name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
        except (OSError, StopIteration):
            pass
        name += f" ({native().cpu_isa()})"  # one name may stand for several processors
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def commit() -> str:
    """Of the checkout, with a + where files differ from it."""
    root = Path(__file__).parent
    git = lambda *args: subprocess.run(["git", *args], cwd=root, capture_output=True, text=True).stdout.strip()  # noqa: E731
    head = git("rev-parse", "--short", "HEAD") or "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def tunables() -> str:
    return os.environ.get("GLIBC_TUNABLES", "")
