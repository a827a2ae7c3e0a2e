"""What is written down of a workload, whatever times it: parity first, then times, ratios and memory, as JSON."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

from benchmarks import measure
from benchmarks.formulas import reference
from benchmarks.measure import Call, Timing
from benchmarks.peers import Peer, parity
from benchmarks.workloads import Inputs, Workload

SCHEMA = 1


def where() -> dict[str, str]:
    return {"date": str(date.today()), "machine": measure.machine(), "commit": measure.commit()}


def agreeing(
    w: Workload, x: Inputs, peers: list[Peer], failed: Callable[[Peer, Exception], None]
) -> tuple[dict[str, Call], dict[str, float]]:
    """The calls of all that can run it and agree with the formula, and how far each is from it. ``failed`` is told of
    the others, and may raise."""
    expected = reference(w, x)
    calls, off = {}, {}
    for peer in peers:
        try:
            alternative = peer.build(w, x)
            difference = parity(w, x, peer, alternative, expected)
        except Exception as error:
            failed(peer, error)
            continue
        calls[peer.name] = alternative.step(w.backward)
        if difference is not None:
            off[peer.name] = difference
    return calls, off


def said(error: Exception) -> str:
    """In a line, for what is left out."""
    return f"failed: {(str(error).splitlines() or [type(error).__name__])[0]}"


def summary(w: Workload, timings: dict[str, Timing], peers: list[Peer]) -> dict[str, Any]:
    """What the tables show: ratios of minima over pycse's, and the share of the limit."""
    ours = timings["pycse"].best
    ratios = {name: timing.best / ours for name, timing in timings.items() if name != "pycse"}
    limits = [peer.name for peer in peers if peer.limit and peer.name in ratios]
    share = min((ratios[name] for name in limits), default=None)  # of the fastest floor
    if w.op == "sparse" and "eager" in ratios:
        share = ratios["eager"] * (1 - w.zeros / 100)  # the dense layer's time for what is kept
    print(f"; {ours * 1e3:.3f} ms; {', '.join(f'{name} {ratio:.4g}' for name, ratio in ratios.items())}", flush=True)
    return {
        "seconds": {name: timing.median for name, timing in timings.items()},
        "best": {name: timing.best for name, timing in timings.items()},
        "spread": timings["pycse"].spread,
        "rounds": len(timings["pycse"].seconds),
        "ratios": ratios,
        "share": share,
    }


def memory(w: Workload, x: Inputs, call: Call) -> int:
    """Peak bytes above inputs and gradients of one call."""
    for leaf in x.leaves:
        leaf.grad = None
    return max(0, measure.peak_memory(call) - (sum(leaf.nbytes for leaf in x.leaves) if w.backward else 0))
