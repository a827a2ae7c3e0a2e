"""Long runs: python -m fuzz --minutes 5, with tests/helpers:tests on PYTHONPATH. `make fuzz MINUTES=5` does that.

Each child process has a seed and counts units. Before a call it writes the unit's and the call's number to memory that
the parent shares, so a crash or a hang leaves the case behind, which the seed makes again. The parent saves it, and a
new child goes on after it. --replay FILE runs a saved case.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

FIELDS = struct.Struct("<8q")  # unit, call, begun (ms), units, compared, refused, read, known
KINDS = ("units", "compared", "refused", "read", "known")
KEPT = 3  # cases of one fault
START = 120  # seconds that a child may take until its first call
STARVED = 10  # how many times the limit a child gets that does not even answer a signal
CHILD = [sys.executable, "-W", "ignore", "-m", "fuzz"]


def _child(seed: int, first: int, progress: Path, faults: Path) -> None:
    import torch

    from fuzz import units
    from fuzz.choices import Seeded

    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(2)
    with progress.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), FIELDS.size)
    totals = list(FIELDS.unpack(memory[:])[3:])
    index, kept = first, Counter()
    while True:
        unit = units.describe(Seeded(seed, index))

        def begins(k: int) -> None:
            FIELDS.pack_into(memory, 0, index, k, int(time.time() * 1000), *totals)  # noqa: B023

        begins(-1)
        made, found = units.run(unit, begins)
        totals[0] += 1
        for k, kind in enumerate(KINDS[1:], 1):
            totals[k] += made[kind]
        for fault in found:
            key = signature(fault["error"])
            kept[key] += 1
            if kept[key] <= KEPT:
                with faults.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"seed": seed, "index": index, **fault}) + "\n")
        index += 1


def signature(error: str) -> str:
    """An error without its numbers."""
    return re.sub(r"[-+0-9.]+(e[-+]?\d+)?", "#", error.partition(" raised ")[2] or error)[:120]


class Worker:
    """A child process, and its successors after a crash or a hang."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder, self.crashes, self.hangs = seed, folder, 0, 0
        self.progress, self.faults = folder / f"progress-{seed}", folder / f"faults-{seed}.jsonl"
        self.errors = folder / f"stderr-{seed}"
        self.progress.write_bytes(FIELDS.pack(0, -1, 0, 0, 0, 0, 0, 0))
        self.start(0)

    def start(self, first: int) -> None:
        self.started, self.warned = time.time(), False
        command = [*CHILD, "--child", str(self.seed), str(first), str(self.folder)]
        # Threads that wait must not spin: there are more of them than processors.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(command, env=environment, stderr=errors)

    def state(self) -> tuple[int, ...]:
        return FIELDS.unpack(self.progress.read_bytes())

    def watch(self, hang: float) -> None:
        unit, call, begun, *_ = self.state()
        ended = self.process.poll()
        if begun / 1000 > self.started:
            self.warned = False
        limit = hang if self.warned or begun / 1000 > self.started else max(hang, START)
        hung = ended is None and time.time() - max(begun / 1000, self.started) > limit
        if ended is None and not hung:
            return
        if hung and not self.warned:  # it writes where it is, as soon as the machine has time for it
            self.said = self.errors.stat().st_size
            self.process.send_signal(signal.SIGUSR1)
            self.warned, self.started, self.given = True, time.time(), time.time()
            return
        if hung and self.errors.stat().st_size == self.said and time.time() - self.given < STARVED * hang:
            return
        if hung:
            self.process.kill()
            self.process.wait()
        kind = "hang" if hung else "crash"
        self.hangs += hung
        self.crashes += not hung
        from fuzz import units
        from fuzz.choices import Seeded

        case = {
            "seed": self.seed,
            "index": unit,
            "call": call,
            "exit": ended,
            "unit": units.describe(Seeded(self.seed, unit)),
        }
        path = self.folder / f"{kind}-{self.seed}-{unit}.json"
        path.write_text(json.dumps(case, indent=1), encoding="utf-8")
        print(f"{kind} (exit {ended}): python -m fuzz --replay {path}", flush=True)
        if self.crashes + self.hangs < 50:
            self.start(unit + 1)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _run(minutes: float, seeds: list[int], folder: Path, hang: float) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    workers = [Worker(seed, folder) for seed in seeds]
    try:
        while time.time() - began < 60 * minutes:
            time.sleep(0.5)
            for worker in workers:
                worker.watch(hang)
    finally:
        for worker in workers:
            worker.stop()
    seconds = time.time() - began
    totals = Counter()
    for worker in workers:
        totals.update(dict(zip(KINDS, worker.state()[3:])))
    crashes, hangs = sum(w.crashes for w in workers), sum(w.hangs for w in workers)
    done = totals["compared"] + totals["refused"] + totals["read"]
    print(
        f"{done} calls in {seconds:.0f} s, {done / seconds:.0f} a second: {totals['compared']} compared with the "
        f"reference, {totals['refused']} that must be refused, {totals['read']} damaged files; {totals['known']} left "
        "out for known faults"
    )
    faults: dict[str, Any] = {}
    for worker in workers:
        if worker.faults.exists():
            for line in worker.faults.read_text(encoding="utf-8").splitlines():
                fault = json.loads(line)
                faults.setdefault(signature(fault["error"]), fault)
    for n, fault in enumerate(faults.values()):
        path = folder / f"fault-{n}.json"
        path.write_text(json.dumps(fault, indent=1), encoding="utf-8")
        print(f"{fault['error'][:300]}\n    python -m fuzz --replay {path}")
    print(f"{crashes} crashes, {hangs} hangs, {len(faults)} other faults that differ")
    return int(bool(crashes or hangs or faults))


def _replay(path: Path) -> int:
    from fuzz import known, units

    faulthandler.enable()
    known.fault = lambda unit: None
    _, found = units.run(json.loads(path.read_text(encoding="utf-8"))["unit"], lambda k: print(f"call {k}", flush=True))
    for fault in found:
        print(fault["error"])
    return int(bool(found))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="*", help="one child process each; default: as many as processors")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="where cases are kept")
    parser.add_argument("--hang", type=float, default=60, help="seconds that a call may take")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        seed, first, folder = given.child
        _child(int(seed), int(first), Path(folder) / f"progress-{seed}", Path(folder) / f"faults-{seed}.jsonl")
    if given.replay:
        return _replay(given.replay)
    seeds = given.seeds or [int(time.time()) + k for k in range(os.cpu_count() or 1)]
    print("seeds", *seeds, flush=True)
    return _run(given.minutes, seeds, given.folder, given.hang)


if __name__ == "__main__":
    sys.exit(main())
