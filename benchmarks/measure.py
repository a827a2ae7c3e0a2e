"""How everything here is timed: alternatives take turns in one process, and ratios are of their minima.

The speed of a shared machine drifts by a factor of two, so absolute times are never compared between runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass
class Timing:
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


def interleaved(calls: dict[str, Callable[[], object]], budget: float = 10.0, least: int = 5) -> dict[str, Timing]:
    """Each call in turn, round after round, for about ``budget`` seconds and at least ``least`` rounds."""
    timings = {name: Timing() for name in calls}
    inner = {}
    for name, call in calls.items():  # warm up; short calls are timed in batches of about 10 ms
        call()
        start = time.perf_counter()
        call()
        inner[name] = max(1, int(0.01 / (time.perf_counter() - start)))
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, call in calls.items():
            n = inner[name]
            start = time.perf_counter()
            for _ in range(n):
                call()
            timings[name].seconds.append((time.perf_counter() - start) / n)
        rounds += 1
    return timings


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rose above its level before the call, at the highest.

    Linux: the kernel's high-water mark, reset before the call; elsewhere a sampling thread is not precise enough.
    """

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
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def arguments(doc: str | None, short: str) -> argparse.Namespace:
    """--short and --json of a benchmark, after which it says what it runs on."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    chosen = parser.parse_args()
    print(f"{date.today()}  {machine()}\nGLIBC_TUNABLES: {tunables()}\n")
    return chosen


def save(path: str | None, **numbers: Any) -> None:
    """The numbers as JSON, with when and where they were measured."""
    if path:
        with open(path, "w") as file:
            json.dump(
                {"date": str(date.today()), "machine": machine(), "tunables": tunables()} | numbers, file, indent=1
            )


def tunables() -> str:
    """What GLIBC_TUNABLES says about the allocator: eager's time at large N depends on it."""
    return os.environ.get("GLIBC_TUNABLES", "(unset: every large temporary is mapped and faulted in anew)")


RAISED = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184"


def machine() -> str:
    name = "unknown processor"
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {threading.active_count()} Python threads"
