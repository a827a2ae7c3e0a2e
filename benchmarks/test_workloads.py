"""One test a workload, for pytest-benchmark: parity first, then rounds in which pycse and its peers take turns.

pytest-benchmark times pycse; each round's setup times every peer once, so that all of them see the same machine.
``extra_info`` has everything that the tables are made of. ``python -m benchmarks`` runs this.
"""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import measure
from benchmarks.formulas import in_part, reference
from benchmarks.measure import Timing, Turns, in_new_process, peak_memory
from benchmarks.peers import PEERS, ParityError, Peer, beside, compared, parity
from benchmarks.workloads import ROWS, WORKLOADS, Workload, inputs, small


@pytest.fixture(autouse=True)
def threads(workload: Workload, request: pytest.FixtureRequest):
    """Row kernels run on one thread: their yardstick then needs only one quiet core."""
    before = torch.get_num_threads()
    if workload.op in ROWS or request.config.getoption("one_thread"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_workload(benchmark, workload: Workload, request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    names = [name for name in option("peers").split(",") if name]
    chosen, left_out = beside(workload, names, option("set") == "full")
    info = benchmark.extra_info
    info |= {"name": workload.name, "left out": left_out, "differs": {p.name: p.differs for p in chosen if p.differs}}
    if not workload.timed:
        chosen = chosen[:1]
        print(f"{workload.name}: memory only", flush=True)
        benchmark.pedantic(lambda: None)
    elif workload.huge:
        _alone(benchmark, workload, [p for p in chosen if p.limit or p.name == "pycse" or option("set") == "full"])
    else:
        _in_turns(benchmark, workload, chosen, option("seconds"))
    if workload.measures_memory and not (workload.timed and workload.huge) and not option("times_only"):
        names = [p.name for p in chosen if not (p.limit or p.name in left_out or p.name == "compile")]
        info["memory"] = {name: in_new_process(memory, workload.name, name) for name in names if name[:6] != "pycse-"}


def _in_turns(benchmark, w: Workload, peers: list[Peer], seconds: float) -> None:
    """Interleaved rounds in this process."""
    x = inputs(w, measure.device())
    expected = reference(w, x)
    calls, off = {}, {}
    for peer in peers:
        try:
            alternative = peer.build(w, x)
            difference = parity(w, x, peer, alternative, expected)
        except Exception as error:
            if isinstance(error, ParityError) or not peer.requirement:
                raise
            benchmark.extra_info["left out"][peer.name] = f"failed: {str(error).splitlines()[0]}"
            continue
        calls[peer.name] = alternative.step(w.backward)
        if difference is not None:
            off[peer.name] = difference
    del expected
    print(f"{w.name}: parity {', '.join(f'{name} {value:.0e}' for name, value in off.items())}", end="", flush=True)
    turns = Turns(calls, benchmark._timer)
    rounds = turns.plan(seconds if w.N < 8192 or w.op in ROWS else 2 * seconds)
    benchmark.pedantic(lambda: turns.run("pycse"), setup=turns.time_others, rounds=rounds)
    turns.timings["pycse"] = Timing([s / turns.batch["pycse"] for s in benchmark.stats.stats.data])
    benchmark.extra_info |= {"parity": off} | summary(w, turns.timings)


def _alone(benchmark, w: Workload, peers: list[Peer]) -> None:
    """Calls of many seconds: each once, in a process of its own, which also says its peak memory."""
    results: dict[str, tuple[float, int, float | None]] = {}
    for peer in peers[1:]:
        results[peer.name] = in_new_process(alone, w.name, peer.name)
    benchmark.pedantic(lambda: results.__setitem__("pycse", in_new_process(alone, w.name, "pycse")), rounds=1)
    off = {name: difference for name, (_, _, difference) in results.items() if difference is not None}
    print(f"{w.name}: parity {', '.join(f'{name} {value:.0e}' for name, value in off.items())}", end="", flush=True)
    timings = {name: Timing([seconds]) for name, (seconds, _, _) in results.items()}
    limits = {p.name for p in peers if p.limit}
    memory = {name: peak for name, (_, peak, _) in results.items() if name not in limits}
    benchmark.extra_info |= {"parity": off, "memory": memory} | summary(w, timings)


def summary(w: Workload, timings: dict[str, Timing]) -> dict[str, object]:
    """What the tables show: ratios of minima over pycse's, and the share of the limit."""
    ours = timings["pycse"].best
    ratios = {name: timing.best / ours for name, timing in timings.items() if name != "pycse"}
    limits = [p.name for p in PEERS if p.limit and p.name in ratios]
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


def _prepared(name: str, peer_name: str):
    """In a new process: inputs, and a peer's call on them, after the same call on fewer rows has loaded the
    libraries."""
    w = next(w for w in WORKLOADS if w.name == name)
    peer = next(p for p in PEERS if p.name == peer_name)
    peer.build(less := small(w), inputs(less, measure.device())).step(w.backward)()
    x = inputs(w, measure.device())
    return w, peer, x, peer.build(w, x).step(w.backward)


def memory(name: str, peer_name: str) -> int:
    """Peak bytes above inputs and gradients."""
    w, _, x, call = _prepared(name, peer_name)
    return max(0, peak_memory(call) - (sum(leaf.nbytes for leaf in x.leaves) if w.backward else 0))


def alone(name: str, peer_name: str) -> tuple[float, int, float | None]:
    """Seconds, peak bytes above inputs and gradients, and parity of one call."""
    w, peer, x, call = _prepared(name, peer_name)
    seconds: list[float] = []
    outputs: list[torch.Tensor] = []

    def timed() -> None:
        start = time.perf_counter()
        outputs.append(call())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)

    peak = peak_memory(timed)
    if peer.limit:
        return seconds[0], 0, None
    gradients = [leaf.grad for leaf in x.leaves if leaf.grad is not None]
    peak -= sum(g.nbytes for g in gradients)
    expected = reference(w, x)
    results = [gradients[0][: len(expected[0])]] if in_part(w) else [outputs[0].detach(), *gradients]
    return seconds[0], max(0, peak), compared(w, x, peer, results, expected)
