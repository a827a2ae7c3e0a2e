"""Processes of this machine in one group, and what their losses say to each other: bytes and seconds of each
collective."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pycse.distributed import collectives

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for a rank whose step is long
# By kind: which argument is the tensor that all ranks' parts make up.
KINDS = {"all_gather": 0, "reduce_scatter": 1, "all_reduce": 0}


@dataclass
class Call:
    """One collective of a rank."""

    kind: str
    what: str  # headers, keys, gradients, ...
    bytes: int  # of the tensor that all ranks' parts make up
    waiting: float  # seconds until all ranks had come; 0 where they were not waited for
    seconds: float  # from then on


class Watch:
    """Within it every collective of pycse's losses is noted, in turn.

    ``apart``: ranks meet at a barrier before each, so that waiting for a slower rank is told from communication.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.apart = False
        self.replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Watch:
        users = [module for name, module in sys.modules.items() if name.startswith("pycse.distributed")]
        for kind in KINDS:
            original = getattr(collectives, kind)
            watched = self._watched(kind, original)
            for module in users:
                if vars(module).get(kind) is original:
                    self.replaced.append((module, kind, original))
                    setattr(module, kind, watched)
        return self

    def __exit__(self, *_: object) -> None:
        while self.replaced:
            setattr(*self.replaced.pop())

    def _watched(self, kind: str, original: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            *_, group, what = args
            self.timed(kind, what, args[KINDS[kind]], group, lambda: original(*args))

        return call

    def timed(self, kind: str, what: str, every: Tensor, group: Any, call: Callable[[], object]) -> None:
        start = ready = time.perf_counter()
        if self.apart:
            dist.barrier(group)
            ready = time.perf_counter()
        call()
        size = every.numel() * every.element_size()
        self.calls.append(Call(kind, what, size, ready - start, time.perf_counter() - ready))


def together(processes: int, threads: int, call: Callable[..., T], *args: Any) -> list[T]:
    """call(rank, *args) in each of so many new processes, which are one group of gloo; their results by rank. What
    goes wrong first in one of them is raised."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
    ):
        store = str(Path(folder) / "store")
        futures = [pool.submit(_member, rank, processes, threads, store, call, args) for rank in range(processes)]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]


def _member(rank: int, processes: int, threads: int, store: str, call: Callable[..., T], args: tuple[Any, ...]) -> T:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo's tensors are the CPU's
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")  # nobody else's network
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=TIMEOUT)
    try:
        return call(rank, *args)
    finally:  # ends it for ranks that wait for this one, too
        dist.destroy_process_group()
