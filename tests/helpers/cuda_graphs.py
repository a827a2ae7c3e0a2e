"""A step in a CUDA graph, and one that never waits for the GPU, for the tests that need either."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def never_waits(step: Callable[[], object]) -> None:
    """Raises where the step synchronises with the GPU; a first call may (it loads libraries)."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(step: Callable[[], T]) -> Callable[[], T]:
    """A function that replays ``step`` and returns its results, in the memory they were captured with."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(), step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> T:
        graph.replay()
        return kept

    return replay
