"""How everything here is timed: alternatives take turns in one process, and ratios are of their minima.

The speed of a shared machine drifts by a factor of two, so absolute times are never compared between runs. What turns
are timed with is a ``Clock``: this process's timer, a GPU's events, or its events around replays of CUDA graphs.
"""

from __future__ import annotations

import multiprocessing
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
Call = Callable[[], object]
BATCH = 0.01  # seconds; short calls are timed in batches of about that
LONG = 0.2  # seconds; calls as long need no second look
REPEAT = 10  # calls in a CUDA graph, one after the other
CACHE = 512 << 20  # bytes, more than any GPU's L2 holds
BUSY = 1_000_000  # cycles that keep a GPU at work while the host hands it the launches to be timed
COLD = 10  # calls of a turn with a cold cache: writing it over takes longer than they do
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


class Clock:
    """Seconds of calls by a timer of this process, which waits for the GPU where there is one.

    Args:
        timer: ``time.process_time`` leaves out what other processes take; only for calls on one thread.
    """

    def __init__(self, timer: Callable[[], float] | None = None) -> None:
        self.timer = timer or time.perf_counter

    def ready(self, call: Call) -> Call:
        """What is timed for a call."""
        return call

    def run(self, call: Call, count: int) -> None:
        for _ in range(count):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def seconds(self, call: Call, count: int = 1) -> float:
        """Of one call, in a batch of so many."""
        start = self.timer()
        self.run(call, count)
        return (self.timer() - start) / count


class Events(Clock):
    """Seconds of the GPU between two events. ``cold``: its L2 cache is written over before every call, and its launches
    are handed over while it is still at work."""

    def __init__(self, cold: bool = False) -> None:
        super().__init__()
        self.cache = torch.empty(CACHE, dtype=torch.uint8, device=device()) if cold else None

    def seconds(self, call: Call, count: int = 1) -> float:
        turns = [count] if self.cache is None else [1] * min(count, COLD)
        spans = []
        for calls in turns:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.cache is not None:
                self.cache.zero_()
                torch.cuda._sleep(BUSY)
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3 / sum(turns)


class Graphs(Events):
    """The same of CUDA graphs: without the host's part of a call."""

    def ready(self, call: Call) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(), call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPEAT):
                call()
        return graph.replay

    def seconds(self, call: Call, count: int = 1) -> float:
        return super().seconds(call, max(1, count // REPEAT)) / REPEAT


class Turns:
    """Calls that take turns, round after round; short ones come in batches.

    Args:
        calls: by name, each run before; a round goes through all of them, the first one last.
        clock: what times them, by default the wall.
    """

    def __init__(self, calls: dict[str, Call], clock: Clock | None = None) -> None:
        self.first, *self.others = calls
        self.calls, self.clock = calls, clock or Clock()
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
        self.clock.run(self.calls[name], self.batch[name])

    def time_others(self) -> None:
        for name in self.others:
            if self.left.get(name, 1):
                self.timings[name].seconds.append(self._time(name))
            if name in self.left:
                self.left[name] = max(0, self.left[name] - 1)

    def time_first(self) -> None:
        self.timings[self.first].seconds.append(self._time(self.first))

    def _time(self, name: str) -> float:
        return self.clock.seconds(self.calls[name], self.batch[name])


def interleaved(calls: dict[str, Call], budget: float = 10.0, clock: Clock | None = None) -> dict[str, Timing]:
    """Each call in turn, round after round, for about ``budget`` seconds."""
    for call in calls.values():
        call()
    clock = clock or Clock()
    turns = Turns({name: clock.ready(call) for name, call in calls.items()}, clock)
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


def tidy() -> None:
    """Gives back what a GPU's allocator keeps; raises where an earlier call has broken the GPU's context."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


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
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"
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

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    head = git("rev-parse", "--short", "HEAD") or "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
