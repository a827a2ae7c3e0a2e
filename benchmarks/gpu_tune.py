"""The tuner of a session on a GPU: rows of a panel by every route, the fused GEMM's tiles and their order, the sparse
product's tiles. The fastest of each ("best") is for the tables of pycse/backends and panels/products.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks import internals
from benchmarks.formulas import reference
from benchmarks.measure import Clock, interleaved
from benchmarks.peers import on_backend, parity
from benchmarks.workloads import Workload, inputs


class Trial:
    """A workload that is timed again and again, each time computed in another way."""

    def __init__(self, w: Workload, device: str, clock: Clock, seconds: float) -> None:
        self.w, self.clock, self.seconds = w, clock, seconds
        self.x = inputs(w, device)
        self.expected = reference(w, self.x)

    def milliseconds(self, backend: str) -> float | str:
        peer = on_backend(backend)
        try:
            alternative = peer.build(self.w, self.x)
            parity(self.w, self.x, peer, alternative, self.expected)
            call = alternative.step(self.w.backward)
            return 1e3 * interleaved({backend: call}, self.seconds, self.clock)[backend].median
        except Exception as problem:  # shared memory, compilation, parity: not here
            return f"{type(problem).__name__}: {problem}"[:200]


def tune(largest: Trial, layer: Trial, backends: list[str], panels: Iterable[int], turned: str) -> dict[str, Any]:
    """``turned``: Triton's backend, whose tables are tried, or one that rehearses it; "" leaves them out."""
    rows: dict[str, Any] = {}
    for backend in backends:
        for route, setting in internals.routes(backend).items():
            rows[route] = {}
            for c in panels:
                with setting(), internals.panels(c):
                    rows[route][f"{c}"] = largest.milliseconds(backend)
    found: dict[str, Any] = {"panel rows": rows}
    for what, values in internals.triton_alternatives().items() if turned else ():
        trial = layer if what.startswith("sparse") else largest
        found[what] = {}
        for label, setting in values.items():
            with setting():
                found[what][label] = trial.milliseconds(turned)
    return {**found, "best": best(found)}


def best(tables: dict[str, Any]) -> dict[str, Any]:
    """The label of the least time in every table of times."""
    labels: dict[str, Any] = {}
    for what, times in tables.items():
        if any(isinstance(t, dict) for t in times.values()):
            labels[what] = best(times)
        elif numbers := {label: t for label, t in times.items() if not isinstance(t, str)}:
            labels[what] = min(numbers, key=numbers.__getitem__)
    return labels
