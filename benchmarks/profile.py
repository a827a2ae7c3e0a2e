"""Where the time of one call goes: Focal-InfoNCE, forward + backward, at B = 64 and N = 8192, stage by stage.

Every function on the way is wrapped in a clock while the call runs; a stage's time is its own, without the stages that
it calls. Inside the one native call of a small batch, parts are told apart by leaving gradients out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

import pycse
from benchmarks import internals
from benchmarks.workloads import Inputs, Workload, inputs

Stages = dict[str, float]


def product(N: int) -> Callable[..., str]:
    """Which of the three a matrix product is, by its operands' shapes."""

    def stage(left: Tensor, right: Tensor) -> str:
        if right.shape[1] == N:
            return "S = z1hat z2^T"
        return "G z2" if left.shape[1] == N else "G^T z1hat"

    return stage


@contextmanager
def clocks(stages: Stages, N: int) -> Iterator[None]:
    """Adds the seconds of every wrapped call to its stage."""
    inside = [0.0]  # seconds of the stages called, level by level

    def wrap(f: Callable[..., Any], stage: Callable[..., str]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return f(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                name = stage(*args)
                stages[name] = stages.get(name, 0.0) + seconds - inside.pop()
                inside[-1] += seconds

        return timed

    def called(name: str) -> Callable[..., str]:
        return lambda *args: name

    places: list[tuple[Any, str, Callable[..., str]]] = [
        (torch, "mm", product(N)),
        (torch.Tensor, "addmm_", lambda total, left, right: product(N)(left, right)),
        (torch.Tensor, "backward", called("backward()")),
        *((owner, name, called(stage)) for owner, name, stage in internals.stages()),
    ]
    with ExitStack() as clocked:
        for owner, name, stage in places:
            clocked.enter_context(internals.replaced(owner, name, wrap(getattr(owner, name), stage)))
        yield


def stages_of(x: Inputs, N: int, rounds: int, batch: int) -> Stages:
    """Seconds of a call by stage, with "rest" and "total", of the fastest of some rounds."""
    best: Stages = {"total": float("inf")}
    for _ in range(rounds):
        stages: Stages = {}
        with clocks(stages, N):
            start = time.perf_counter()
            for _ in range(batch):
                for leaf in x.leaves:
                    leaf.grad = None
                loss = pycse.fused_focal_infonce(*x.leaves)
                if loss.requires_grad:
                    loss.backward()
            total = time.perf_counter() - start
        stages |= {"rest": total - sum(stages.values()), "total": total}
        if total < best["total"] * batch:
            best = {name: seconds / batch for name, seconds in stages.items()}
    return best


def profile(rounds: int = 20) -> dict[str, Stages]:
    small, large = inputs(Workload("focal", 64)), inputs(Workload("focal", 8192))
    stages = stages_of(small, 64, rounds, 50)
    z1, z2 = small.leaves
    parts = [
        stages_of(Inputs([a, b]), 64, rounds, 50).get("one native call", 0.0)
        for a, b in ((z1.detach(), z2.detach()), (z1, z2.detach()))
    ]
    if "one native call" in stages:
        whole = stages.pop("one native call")
        split = {
            "native: norms, S, row kernel, loss": parts[0],
            "native: G, G z2, projection": parts[1] - parts[0],
            "native: G^T z1hat, projection": whole - parts[1],
        }
        stages = split | stages
    return {"64": stages, "8192": stages_of(large, 8192, max(3, rounds // 5), 1)}
