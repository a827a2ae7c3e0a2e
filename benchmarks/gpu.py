"""A session on a machine with a GPU: its workloads beside their peers, where their time goes, and the tuner.

    python -m benchmarks.gpu                     what is not yet measured, in about 4 minutes
    python -m benchmarks.gpu --only focal-65536  tasks with that in their name, anew (also: graph, cold, kernels, tune)
    python -m benchmarks.gpu --exercise          each kernel once on small ragged shapes, for compute-sanitizer
    python -m benchmarks.gpu --dry-run           all of it in tiny on the processor: no number means anything

benchmarks/gpu.sh builds and tests first. Workloads, peers, parity, turns and the rows of the results are those of
``python -m benchmarks run``; here they are timed by the GPU's events, also as CUDA graphs and with a cold L2 cache.
gpu-DATE.json, and the targets as gpu-DATE.md, are written after every task. A run on the same machine and commit goes
on with what an earlier one left; a task that fails says so and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pycse
from benchmarks import measure, record
from benchmarks.docs import markdown
from benchmarks.gpu_exercise import exercise
from benchmarks.gpu_tune import Trial, tune
from benchmarks.measure import Clock, Events, Graphs, interleaved
from benchmarks.peers import PANELS, PEERS, PYCSE, Peer, beside, on_backend
from benchmarks.workloads import ON_A_GPU, Workload, inputs

RESULTS = Path(__file__).parent / "results"
CLOCKS: dict[str, Callable[[], Clock]] = {"rows": Events, "graph": Graphs, "cold": partial(Events, cold=True)}
BESIDE = {"rows": [], "graph": ["eager", "pycse-none", "pycse-expected"], "cold": ["eager", "stk"]}  # []: all
PROFILED = (
    "focal-65536x768-bf16",
    "symmetric-65536x768-bf16",
    "focal-64x768-bf16",
    "distillcse-16384x768-bf16-4-sample",
)
LAYER = "sparse-block64-75-8192x768x3072-bf16-forward"
BY_NAME = {w.name: w for _, w in ON_A_GPU}
KERNELS = 12  # of a call that are listed, the longest
Results = dict[str, Any]


class Session:
    """What is measured here, and how; ``dry`` takes the same steps on the processor, in tiny."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, measure.device()
        self.seconds = 0.02 if dry else 1.5  # for the rounds of a workload
        states, auto = pycse.info().backends, pycse.info().auto[self.device]
        wanted = ("cpu", "torch") if dry else ("triton", "cuda")
        self.auto, self.others = auto, [n for n in wanted if n != auto and states[n] == "usable"]
        self.missing = {name: states[name] for name in wanted if states[name] != "usable"}

    @property
    def backends(self) -> list[str]:
        return [self.auto, *self.others]

    def clock(self, section: str) -> Clock:
        return Clock() if self.dry else CLOCKS[section]()

    def sized(self, w: Workload) -> Workload:
        return replace(w, N=64, D=256, out=min(w.out, 512), compiled=False) if self.dry else w

    def tasks(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """By section of the results, and workload."""
        return {
            "ceilings": self.ceilings,
            **{f"{section} {w.name}": partial(self.row, section, w) for section, w in ON_A_GPU},
            **{f"kernels {name}": partial(self.kernels, BY_NAME[name]) for name in PROFILED},
            "tune": self.tune,  # last: it tries what may not run
        }

    def ceilings(self) -> dict[str, float]:
        """What the machine gives today: copies, and a bf16 product."""
        n = 128 if self.dry else 8192
        a, b = (torch.randn(n, n, device=self.device).to(torch.bfloat16) for _ in range(2))
        out, x = torch.empty_like(a), torch.empty(1 << (12 if self.dry else 30), device=self.device)
        y = torch.empty_like(x)
        calls: dict[str, measure.Call] = {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: y.copy_(x)}
        t = interleaved(calls, self.seconds, self.clock("rows"))
        return {
            "product TF/s": 2e-12 * n**3 / t["product"].median,
            "copy TB/s": 2e-12 * x.nbytes / t["copy"].median,
        }

    def row(self, section: str, named: Workload) -> dict[str, Any]:
        """A workload beside its peers and by each backend, as ``benchmarks run`` would write it down."""
        w = self.sized(named)
        peers, left_out = beside(w, BESIDE[section], False)
        peers += [on_backend(name) for name in self.others]
        peers += [on_backend(name, "none") for name in self.others if w.shuffle == "sample"]
        row: dict[str, Any] = {"name": named.name, "left out": left_out}
        row["differs"] = {p.name: p.differs for p in peers if p.differs}

        def failed(peer: Peer, error: Exception) -> None:
            if peer is PYCSE:
                raise error
            left_out[peer.name] = record.said(error)
            if peer.limit or peer.name.startswith("pycse"):
                row["error"] = f"{peer.name} {left_out[peer.name]}"

        x = inputs(w, self.device)
        calls, off = record.agreeing(w, x, peers, failed)
        print(f"{section} {named.name}: parity {', '.join(f'{n} {v:.0e}' for n, v in off.items())}", end="")
        timings = interleaved(calls, self.seconds, self.clock(section))
        row |= {"parity": off, **record.summary(w, timings, peers)}
        if named.measures_memory:
            limits = {"compile", *(p.name for p in peers if p.limit)}
            row["memory"] = {name: record.memory(w, x, call) for name, call in calls.items() if name not in limits}
        return row

    def kernels(self, named: Workload) -> dict[str, Any]:
        """Where the time of a call goes, by backend: its kernels, the longest first, in microseconds."""
        w = self.sized(named)
        x = inputs(w, self.device)
        activity = torch.profiler.ProfilerActivity.CPU if self.dry else torch.profiler.ProfilerActivity.CUDA
        row = {}
        for name in self.backends:
            call = on_backend(name).build(w, x).step(True)
            call()
            with torch.profiler.profile(activities=[activity]) as seen:
                call()
                measure.tidy()
            spent = [
                (e.key, e.count, e.cpu_time_total if self.dry else e.device_time_total) for e in seen.key_averages()
            ]
            longest = sorted(spent, key=lambda e: -e[2])[:KERNELS]
            row[name] = [{"kernel": key[:120], "calls": count, "us": us} for key, count, us in longest]
        return row

    def tune(self) -> dict[str, Any]:
        largest, layer = (
            Trial(self.sized(BY_NAME[name]), self.device, self.clock(section), self.seconds / 5)
            for section, name in (("rows", PROFILED[0]), ("cold", LAYER))
        )
        panels = (16, 64) if self.dry else [c for c in PANELS if c >= 1024]
        turned = "triton" if "triton" in self.backends else "torch" if self.dry else ""
        return tune(largest, layer, self.backends, panels, turned)


# --- results


def at(results: Results, task: str) -> dict[str, Any] | None:
    section, _, name = task.partition(" ")
    row = results.get(section, {})
    return (row.get(name) if name else row) or None


def begun(session: Session, folder: Path, fresh: bool) -> tuple[Path, Results]:
    """The file to write, and what an earlier run on this machine and commit has left there or in benchmarks/results."""
    here: Results = {"schema": record.SCHEMA, **record.where(), "auto": session.auto}
    here["missing"] = session.missing | {p.name: reason for p in PEERS if (reason := p.missing())}
    stem = f"gpu-{'dry-run-' if session.dry else ''}"
    for file in (
        [] if fresh else sorted([*folder.glob(f"{stem}2*.json"), *RESULTS.glob(f"{stem}2*.json")], reverse=True)
    ):
        earlier = json.loads(file.read_text())
        same = ("schema", "machine", "commit", "auto") + (("date",) if here["commit"] == "unknown" else ())
        if all(earlier.get(key) == here[key] for key in same):
            return folder / file.name, earlier | {"missing": here["missing"]}
    return folder / f"{stem}{here['date']}.json", here


def write(path: Path, results: Results, title: str, tasks: list[str]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")
    lines = [f"# {title}", "", markdown("what | at least | aim | measured", targets(results)), ""]
    for name in tasks:
        row = at(results, name)
        if row is None:
            lines.append(f"- {name}: not yet measured")
        elif "error" in row:
            lines.append(f"- {name} failed: {row['error']}")
        else:
            failures = {peer: why for peer, why in row.get("left out", {}).items() if peer not in results["missing"]}
            lines += [f"- {name}: {peer} {why}" for peer, why in failures.items()]
    lines += [f"- {name} missing: {reason}" for name, reason in results["missing"].items()]
    lines += [f"- fastest {what}: {label}" for what, label in results.get("tune", {}).get("best", {}).items()]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def targets(results: Results) -> list[tuple[str, str, str, str]]:
    """What, at least, aim, measured: by the faster backend, times the medians' and ratios the minima's."""
    named = {"pycse", *(f"pycse-{name}" for name in ("cpu", "torch", "triton", "cuda"))}

    def row(section: str, name: str) -> dict[str, Any]:
        return results[section][name]

    def ours(values: dict[str, float]) -> float:
        return min(value for name, value in values.items() if name in named)

    def times(section: str, name: str, peer: str) -> float:
        best = row(section, name)["best"]
        return best[peer] / ours(best)

    def milliseconds(op: str) -> float:
        return 1e3 * ours(row("rows", f"{op}-65536x768-bf16")["seconds"])

    def microseconds(name: str) -> float:
        return 1e6 * ours(row("graph", name)["seconds"])

    def most(op: str, peer: str) -> float:
        """Over the sizes that the peer can run."""
        rows = [w.name for section, w in ON_A_GPU if section == "rows" and w.op == op and w.name in results["rows"]]
        return max(times("rows", name, peer) for name in rows if peer in row("rows", name).get("best", {}))

    def share() -> float:
        best = row("rows", PROFILED[0])["best"]
        return min(value for name, value in best.items() if name.startswith("floor")) / ours(best)

    def drawn() -> float:
        best = row("rows", PROFILED[3])["best"]
        return min(best[n] / best[f"{n}-none"] for n in named if n in best and f"{n}-none" in best)

    lines: list[tuple[str, str, str, Callable[[], float]]] = [
        ("Focal, N = 65536, D = 768, one direction, ms", "34", "28", partial(milliseconds, "focal")),
        ("share of the floor of its three products", "0.75", "0.90", share),
        ("symmetric, same size, ms", "45", "38", partial(milliseconds, "symmetric")),
        (
            "peak memory above inputs and gradients, MB",
            "1500",
            "600",
            lambda: ours(row("rows", PROFILED[0])["memory"]) / 1e6,
        ),
        *(
            (f"B = {B}, D = 768, CUDA graph, µs", "60", "25", partial(microseconds, f"focal-{B}x768-bf16"))
            for B in (64, 128, 256, 512)
        ),
        (
            "DistillCSE, B = 64, 16 teachers, CUDA graph, µs",
            "150",
            "60",
            partial(microseconds, "distillcse-64x768-bf16-16-sample"),
        ),
        ("DistillCSE, B = 16384, 4 teachers, sampled over none", "1.3", "1.1", drawn),
        ("block-sparse 75% (64²), over dense cuBLAS, times", "1.8", "2.8", partial(times, "cold", LAYER, "eager")),
        *(
            (f"times faster than {peer}, at the size where most", least, aim, partial(most, op, peer))
            for peer, op, least, aim in (
                ("siglip-kernel", "focal", "1.3", "1.6"),
                ("memeff", "symmetric", "2", "3"),
                ("inf-cl", "infonce", "5", "8"),
                ("eager", "focal", "2.5", "3.5"),
                ("compile", "focal", "-", "-"),
            )
        ),
    ]

    def text(value: Callable[[], float]) -> str:
        try:
            return f"{value():.3g}"
        except (KeyError, ValueError):  # the row, or this peer, was not measured
            return "not measured"

    return [(what, least, aim, text(value)) for what, least, aim, value in lines]


# --- the command


def run(session: Session, folder: Path, only: list[str], seconds: float, fresh: bool) -> int:
    """How many tasks failed or are left."""
    folder.mkdir(parents=True, exist_ok=True)
    path, results = begun(session, folder, fresh)
    title = f"{results['machine']}, {results['date']}, commit {results['commit']}"
    title = "Dry run on the processor: no number here means anything" if session.dry else title
    tasks, begin = session.tasks(), time.perf_counter()
    for name, task in tasks.items():
        row = at(results, name)
        wanted = any(text in name for text in only) if only else row is None or "error" in row
        if not wanted:
            continue
        if (start := time.perf_counter()) - begin > seconds:
            print(f"{seconds:.0f} seconds are over: the same command goes on with {name}")
            break
        try:
            row = task()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
        lost = False
        try:
            measure.tidy()
        except RuntimeError as error:  # the context is lost: every later task would fail
            lost = True
            row.setdefault("error", f"{type(error).__name__}: {error}"[:500])
        row["took"] = round(time.perf_counter() - start, 1)
        section, _, key = name.partition(" ")
        if key:
            results.setdefault(section, {})[key] = row
        else:
            results[section] = row
        write(path, results, title, list(tasks))
        print(f"{name}: {row['took']} s{', failed' if 'error' in row else ''}", flush=True)
        if lost:
            break
    write(path, results, title, list(tasks))
    print(path.with_suffix(".md").read_text())
    return sum(row is None or "error" in row for row in (at(results, name) for name in tasks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the processor")
    parser.add_argument("--exercise", action="store_true", help="each kernel once, nothing timed")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="tasks with this in their name")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=240, help="no further task is begun after these")
    parser.add_argument("--fresh", action="store_true", help="do not go on with an earlier run")
    chosen = parser.parse_args()
    if chosen.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        print("No GPU is available to PyTorch: nothing can be measured here. --dry-run rehearses on the processor.")
        return 1
    torch.manual_seed(0)
    session = Session(chosen.dry_run)
    for text in chosen.only:
        if not any(text in name for name in session.tasks()):
            parser.error(f"--only {text}: it must be in the name of one of {', '.join(session.tasks())}")
    if chosen.exercise:
        return int(exercise(session.backends, session.missing) > 0)
    return int(run(session, chosen.out, chosen.only, chosen.seconds, chosen.fresh) > 0)


if __name__ == "__main__":
    sys.exit(main())
