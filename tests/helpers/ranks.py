"""Ranks of torch.distributed as processes that wait for work: gloo on this machine, started once for a file of tests."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 4
TIMEOUT = 120  # seconds, after which a test fails instead of hanging
GROUP_TIMEOUT = 60


def _serve(rank: int, store: str, pipe: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=MOST, timeout=timedelta(seconds=GROUP_TIMEOUT)
    )
    timeout = timedelta(seconds=GROUP_TIMEOUT)
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, MOST + 1)}
    while (task := pipe.recv_bytes()) != b"end":
        function, size, args = pickle.loads(task)
        try:
            pipe.send((True, function(rank, groups[size], *args)))
        except BaseException as error:
            pipe.send((False, (type(error), str(error), "".join(traceback.format_exception(error)))))
    dist.destroy_process_group()


class Ranks:
    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(MOST):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def outcomes(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Of function(rank, group, *args) on ``size`` ranks: (True, its result) or (False, its error's type, text and
        traceback)."""
        task = pickle.dumps((function, size, args))
        for pipe in self.pipes[:size]:
            pipe.send_bytes(task)
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            failed = [result[2] for fine, result in results if not fine]
            if not pipe.poll(GROUP_TIMEOUT if failed else TIMEOUT):
                raise TimeoutError(
                    f"rank {rank} of {size} has not answered {function.__name__}{args}; others: {failed}"
                )
            results.append(pipe.recv())
        return results

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results; raises where a rank did."""
        results = self.outcomes(size, function, *args)
        for rank, (fine, result) in enumerate(results):
            assert fine, f"rank {rank}: {result[2]}"
        return [result for _, result in results]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(b"end")
        for process in self.processes:
            process.join(10)
            process.kill()
