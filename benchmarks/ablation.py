"""Which part of the training does what: recipes, shuffles and teachers, several seeds each, as a table.

    python -m benchmarks.ablation --eval-file stsb-dev.tsv --teacher all-mpnet-base-v2 --json ablation.jsonl

Every run is `pycse train` with the defaults, but for what its row names. --teacher (repeatable) names the encoders that
teach beside the uncut one in the last row; without it that row is left out. A finished run is a line of the --json
file; a line that is there is not run again, so an interrupted ablation goes on where it was. Teachers' embeddings are
kept in --cache-teachers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from pycse.cli import quiet
from pycse.training.recipes import RECIPES
from pycse.training.settings import Settings

START, UNCUT = "cut encoder, untrained", "uncut encoder (teacher)"
DISTILL_LR = RECIPES["distillcse"].lr
ROWS: dict[str, dict[str, Any]] = {
    "simcse": {"recipe": "simcse"},
    "focal": {"recipe": "focal"},
    f"simcse, lr {DISTILL_LR:g}": {"recipe": "simcse", "lr": DISTILL_LR},
    f"focal, lr {DISTILL_LR:g}": {"recipe": "focal", "lr": DISTILL_LR},
    "distillcse, no shuffle": {"shuffle": "none"},
    "distillcse, sampled Group-P": {"shuffle": "sample"},
    "distillcse, expected Group-P": {"shuffle": "expected"},
    "distillcse, dropout positives": {"positives": "dropout"},
}


def settings_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Row -> the settings that make it, without seed and folders."""
    from pycse.training.names import bundled_model

    shared = {"steps": arguments.steps, "batch_size": arguments.batch_size, "max_length": arguments.max_length}
    rows = dict(ROWS)
    if arguments.teacher:
        rows[f"distillcse, {1 + len(arguments.teacher)} teachers"] = {"teachers": (bundled_model(), *arguments.teacher)}
    return {name: shared | row for name, row in rows.items() if not arguments.row or name in arguments.row}


def finished(path: Path | None) -> list[dict[str, Any]]:
    """The runs in the file. A last line that a killed run left unfinished is dropped from it."""
    if path is None or not path.exists():
        return []
    whole = path.read_text()
    kept = whole[: whole.rfind("\n") + 1]
    if kept != whole:
        path.write_text(kept)
    return [json.loads(line) for line in kept.splitlines()]


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run with their defaults: a line of the file is another run's once a default has changed."""
    chosen = Settings(**settings)
    return json.loads(json.dumps(chosen.as_dict() | {"positives": chosen.positives_of_sentences}))


def key(run: dict[str, Any]) -> str:
    """What makes two runs the same."""
    return json.dumps([run["row"], run["seed"], run["settings"], run["sets"]], sort_keys=True)


def train(settings: dict[str, Any], seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores before and after one run."""
    from rich.console import Console

    from pycse.training.train import train as run_training

    teaches = RECIPES[settings.get("recipe", Settings.recipe)].teaches
    with tempfile.TemporaryDirectory() as folder:
        chosen = Settings(
            **settings,
            seed=seed,
            out=f"{folder}/run",
            eval_files=tuple(arguments.eval_file),
            eval_steps=settings["steps"],
            cache_teachers=arguments.cache_teachers if teaches else None,
        )
        done = run_training(chosen, Console(quiet=True))
        assert done is not None
        run, _ = done
    return {"before": run.before, "after": run.after, "parts": run.parts, "seconds": run.seconds}


def alone(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores of an encoder as it comes."""
    from pycse.training.encoder import load_encoder
    from pycse.training.eval_sets import evaluation_sets
    from pycse.training.evaluate import evaluate
    from pycse.training.names import resolve_model

    return evaluate(load_encoder(resolve_model(name)[0]), evaluation_sets(tuple(arguments.eval_file)))


def table(runs: list[dict[str, Any]], encoders: dict[str, dict[str, Any]]) -> str:
    """Markdown: Spearman a set, mean and standard deviation of the seeds, and the mean seconds of a run."""
    scores = {name: [{"after": found}] for name, found in encoders.items()}
    if runs:
        scores = {START: [{"after": runs[0]["before"]}]} | scores
    for run in runs:
        scores.setdefault(run["row"], []).append(run)
    names = list(next(iter(scores.values()))[0]["after"])
    lines = ["| run | seeds | " + " | ".join(names) + " | s |", "|---|---|" + "---|" * len(names) + "---|"]
    for row, found in scores.items():
        cells = []
        for name in names:
            values = [run["after"][name]["spearman"] for run in found]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        timed = [run["seconds"]["total"] for run in found if "seconds" in run]
        seeds, seconds = (str(len(timed)), f"{statistics.mean(timed):.0f}") if timed else ("", "")
        lines.append(f"| {row} | {seeds} | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--eval-file", action="append", default=[], metavar="FILE", help="score, sentence1, sentence2 a line"
    )
    parser.add_argument("--teacher", action="append", default=[], metavar="ENCODER", help="beside the uncut encoder")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row; repeatable")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3, help="runs a row, with seeds 1, 2, ...")
    parser.add_argument("--json", metavar="FILE", help="one line a finished run; read again to go on")
    parser.add_argument("--cache-teachers", metavar="FOLDER", help="keeps the teachers' embeddings")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    arguments = parser.parse_args()
    quiet(local=True)
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)

    rows = settings_of(arguments)
    unknown = set(arguments.row) - set(rows)
    if unknown:
        parser.error(f"--row {', '.join(sorted(unknown))}: no such row")
    path = Path(arguments.json) if arguments.json else None
    known = {key(run): run for run in finished(path)}
    runs = []
    for seed in range(1, arguments.seeds + 1):  # all rows of a seed first: a table that is interrupted is even
        for name, settings in rows.items():
            run = {"row": name, "seed": seed, "settings": resolved(settings), "sets": arguments.eval_file}
            if key(run) not in known:
                run |= train(settings, seed, arguments)
                if path:
                    with path.open("a") as file:
                        file.write(json.dumps(run) + "\n")
                after = ", ".join(f"{part} {scores['spearman']:.4f}" for part, scores in run["after"].items())
                print(f"{name}, seed {seed}: {after}, {run['seconds']['total']:.0f} s", flush=True)
            runs.append(known.get(key(run), run))
    runs.sort(key=lambda run: list(rows).index(run["row"]))

    from pycse.training.names import bundled_model

    encoders = {UNCUT: alone(bundled_model(), arguments)}
    encoders |= {f"{Path(name).name} (teacher)": alone(name, arguments) for name in arguments.teacher}
    print(f"\nSpearman, mean ± standard deviation; {arguments.steps} steps of {arguments.batch_size}\n")
    print(table(runs, encoders))


if __name__ == "__main__":
    main()
