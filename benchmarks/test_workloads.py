"""One test a workload, for pytest-benchmark: parity first, then rounds in which pycse and its peers take turns.

pytest-benchmark times pycse; each round's setup times every peer once, so that all of them see the same machine.
``extra_info`` has everything that the tables are made of. ``python -m benchmarks`` runs this.
"""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import measure, record
from benchmarks.formulas import in_part, reference
from benchmarks.measure import Clock, Timing, Turns, in_new_process, peak_memory
from benchmarks.peers import PEERS, ParityError, Peer, beside, compared
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

    def failed(peer: Peer, error: Exception) -> None:
        if isinstance(error, ParityError) or not peer.requirement:
            raise error
        benchmark.extra_info["left out"][peer.name] = record.said(error)

    calls, off = record.agreeing(w, x, peers, failed)
    print(f"{w.name}: parity {', '.join(f'{name} {value:.0e}' for name, value in off.items())}", end="", flush=True)
    turns = Turns(calls, Clock(benchmark._timer))
    rounds = turns.plan(seconds if w.N < 8192 or w.op in ROWS else 2 * seconds)
    benchmark.pedantic(lambda: turns.run("pycse"), setup=turns.time_others, rounds=rounds)
    turns.timings["pycse"] = Timing([s / turns.batch["pycse"] for s in benchmark.stats.stats.data])
    benchmark.extra_info |= {"parity": off} | record.summary(w, turns.timings, peers)


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
    benchmark.extra_info |= {"parity": off, "memory": memory} | record.summary(w, timings, peers)


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
    return record.memory(w, x, call)


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
