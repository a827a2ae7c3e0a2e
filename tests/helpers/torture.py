"""kill -9 at seeded points of whole runs: with --resume each has to end bit-equal to the run that nothing broke.

    python tests/helpers/torture.py --points 50 --seed 0

A point is the n-th time that a run opens a file of its folder to write, makes, renames or removes something there: the
moments at which a kill could leave half of something. A run is a child of a process that has imported everything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
EVENTS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree")

COMMON = "--train-file text.txt --device cpu --batch-size 4 --eval-steps 2 --max-length 16 --lr 0.001 --save-steps 2"
RUNS = {
    "train": f"train --model tiny-model {COMMON} --steps 5 --recipe focal --keep best",
    "cache": f"train --model tiny-model --layers 0,2 {COMMON} --steps 4 --cache-teachers CACHE",
    "head": f"train --model tiny-model {COMMON} --steps 4 --recipe simcse --head mlp --grad-accumulation 2",
    "sparsecse": f"train --model tiny-model {COMMON} --steps 3 --recipe sparsecse --score-batches 2",
    "sparsify": "sparsify tiny-model --train-file text.txt --device cpu --batch-size 4 --max-length 16 --lr 0.001"
    " --finetune-steps 3 --recipe simcse --score-batches 2 --save-steps 1",
    "static": "train --static 16 --dims 16,8 --model tiny-model --train-file text.txt --device cpu --batch-size 4 --steps 5"
    " --eval-steps 2 --save-steps 2 --teacher tiny-model",
}


def run(place: Path, arguments: list[str], folder: str, kill: int | None = None) -> tuple[int, int]:
    """(exit code or minus the signal, points passed) of the command in a child, killed at its point ``kill``."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            os.chdir(place)
            log = os.open(place / f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            count = 0

            def watch(event: str, details: Any) -> None:
                nonlocal count
                if event not in EVENTS or f"/{folder}" not in f"/{details[0]}":
                    return
                if event == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR):
                    return
                count += 1
                if count == kill:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            from pycse.cli import app

            try:
                app(arguments, prog_name="pycse")
            except SystemExit as error:
                code = int(error.code or 0)
            os.write(write, str(count).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with open(read) as end:
        passed = int(end.read() or 0)
    return os.waitstatus_to_exitcode(status), passed


def results(folder: Path) -> dict[str, Any]:
    """What has to be equal: weights, and all of metrics.json but times and names of folders."""
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("history", "before", "after", "verdict", "steps")}
    weights = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "model").rglob("*.safetensors"))
    }
    return {"metrics": kept, "weights": weights}


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.startswith((".new-", ".work"))]


def torture(place: Path, points: int, seed: int, say: Any = print) -> list[str]:
    """Kill and resume at as many points, drawn over all runs; what went wrong."""
    generator = random.Random(seed)
    whole: dict[str, tuple[dict[str, Any], int]] = {}
    problems = []
    names = list(RUNS)
    for k in range(points):
        name = names[k % len(names)]
        arguments = RUNS[name].split()

        def given(tag: str, arguments: list[str] = arguments, name: str = name) -> list[str]:
            return [f"{name}-{tag}-teachers" if word == "CACHE" else word for word in arguments]

        if name not in whole:
            code, passed = run(place, [*given("whole"), "--out", f"{name}-whole"], f"{name}-whole")
            if code:
                problems.append(f"{name}: exit code {code}, see {place / name}-whole.log")
                continue
            whole[name] = results(place / f"{name}-whole"), passed
        expected, passed = whole[name]
        at = generator.randint(1, passed)
        folder = f"{name}-{k}"
        code, _ = run(place, [*given(str(k)), "--out", folder], folder, at)
        said = f"{name}, killed at {at} of {passed}"
        if code != -signal.SIGKILL:
            problems.append(f"{said}: exit code {code} instead of a kill")
            continue
        if (place / folder / "run.json").exists():
            code, _ = run(place, [arguments[0], "--resume", folder], folder)
        else:  # killed before it had begun: the same command works again
            code, _ = run(place, [*given(str(k)), "--out", folder], folder)
        if code:
            problems.append(f"{said}: --resume has exit code {code}, see {place / folder}.log")
        elif results(place / folder) != expected:
            problems.append(f"{said}: another result")
        elif left := leftovers(place / folder):
            problems.append(f"{said}: left {left}")
        say(f"{said}: {problems[-1] if problems and problems[-1].startswith(said) else 'equal'}", flush=True)
    return problems


def prepare(place: Path) -> None:
    """An encoder and a text."""
    from tiny_models import make_model

    class Folders:
        def mktemp(self, name: str) -> Path:
            (place / name).mkdir()
            return place / name

    child = os.fork()  # torch computes in children alone: a process that has started threads cannot be forked
    if child == 0:
        make_model(Folders(), "abcdefghijklmnopqrstuvwxyz0123456789.,", seed=0, hidden_size=32)
        os._exit(0)
    os.waitpid(child, 0)
    lines = [
        f"the {a} {b} is in the {c}" for a in ("red", "old", "big") for b in ("cat", "ship") for c in ("sea", "sun")
    ]
    (place / "text.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import scipy.stats  # noqa: F401
    import sentence_transformers  # noqa: F401

    import pycse.training.pruning
    import pycse.training.static.run
    import pycse.training.train
    import pycse.training.trainer  # noqa: F401

    place = Path(tempfile.mkdtemp(prefix="pycse-torture-"))
    prepare(place)
    problems = torture(place, chosen.points, chosen.seed)
    print(*problems, sep="\n")
    print(f"{chosen.points - len(problems)} passed, {len(problems)} failed")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
