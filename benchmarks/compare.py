"""How fast the working tree is beside another commit: both packages compute the same workloads, in two processes that
take turns. A process has one package only, so whatever changed between the two is compared, native code included.

A workload counts only where both sides agree with its formula (benchmarks/peers.py: parity). What the other commit
cannot run, since the benchmarks of today ask for what it does not have, is left out with its reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.measure import BATCH, Timing
from pycse.training.errors import UserError

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".benchmarks" / "compare"  # a folder a commit: its package, built once
LEAST_ROUNDS = 5


@dataclass
class Comparison:
    """One workload on both sides; without timings where one of them cannot run it."""

    workload: str
    parity: dict[str, float]  # of each side to the formula
    timings: dict[str, Timing]
    left_out: str = ""

    @property
    def ratio(self) -> float:
        """The other commit's time over the working tree's, minima: above 1 the working tree is faster."""
        return self.timings["base"].best / self.timings["new"].best


def package_of(ref: str) -> tuple[str, Path]:
    """The commit's short name and a folder to import its package from, built where it is not there yet."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", f"{ref}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        raise UserError(f"--base must be a commit of this repository, got {ref!r}")
    commit = found.stdout.strip()
    site = KEPT / commit / "site"
    if site.is_dir():
        return commit, site
    source, wheels = KEPT / commit / "source", KEPT / commit / "wheel"
    source.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(source, filter="data")
    print(f"building {commit}", flush=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--wheel-dir", str(wheels), str(source)], env={"PYCSE_CUDA": "0", **os.environ})
    if done.returncode:
        raise UserError(f"{commit} cannot be built here")
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return commit, site


class Side:
    """A process with one package, which answers one line for each line."""

    package: Path | str

    def __init__(self, site: Path | None) -> None:
        paths = [*([str(site)] if site else []), str(ROOT)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.compare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
            cwd=ROOT,
        )
        self.package = site or ROOT
        self.package = self.ask("where")

    def ask(self, *words: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the process of {self.package} ended while it was asked for {' '.join(map(str, words))}")
        return json.loads(line)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compared(base: Side, new: Side, workload: str, seconds: float) -> Comparison:
    """Turns of both, the other commit first, for about ``seconds``."""
    sides = {"base": base, "new": new}
    parity, batch, turn = {}, {}, 0.0
    for name, side in sides.items():
        answer = side.ask("prepare", workload)
        if "error" in answer:
            return Comparison(workload, parity, {}, f"{name}: {answer['error']}")
        parity[name] = answer["parity"]
        batch[name] = max(1, int(BATCH / answer["seconds"]))
        turn += answer["seconds"] * batch[name]
    timings = {name: Timing() for name in sides}
    for _ in range(max(LEAST_ROUNDS, int(seconds / turn))):
        for name, side in sides.items():
            timings[name].seconds.append(side.ask("time", batch[name]))
    return Comparison(workload, parity, timings)


def serve() -> None:
    """The process of a side."""
    import time

    import pycse
    from benchmarks import measure
    from benchmarks.formulas import reference
    from benchmarks.peers import PYCSE, parity
    from benchmarks.workloads import WORKLOADS, inputs

    answers, call = os.fdopen(os.dup(1), "w"), None
    os.dup2(2, 1)  # what a library prints is no answer

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    for line in sys.stdin:
        what, *words = json.loads(line)
        answer: Any
        if what == "where":
            answer = str(Path(pycse.__file__).parent)
        elif what == "time":
            answer = timed(*words)
        else:
            try:
                w = next(w for w in WORKLOADS if w.name == words[0])
                x = inputs(w, measure.device())
                alternative = PYCSE.build(w, x)
                difference = parity(w, x, PYCSE, alternative, reference(w, x))
                call = alternative.step(w.backward)
                timed(1)
                answer = {"parity": difference, "seconds": min(timed(1), timed(1))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
