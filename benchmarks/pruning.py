"""What removing parameters costs or gains: share removed against Spearman, for four ways to choose, as a table and a
picture.

    python -m benchmarks.pruning --eval-file stsb-dev.tsv --json pruning.jsonl --picture pruning.png

lowest and highest score (pycse.sparse.score), random, and magnitude; single weights of all transformer layers, one
quota for all; no training afterwards. A seed draws the text that is scored, dropout, and the random choice; magnitude
has no chance in it and runs once. A finished run is a line of the --json file; a line that is there is not run again,
so an interrupted sweep goes on where it was.

    python -m benchmarks.pruning --speed

measures the encoder with half of its neurons and heads removed against the whole one instead.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation import finished
from benchmarks.measure import interleaved, machine
from pycse.cli import quiet
from pycse.training.settings import Settings

METHODS = ("lowest score", "random", "magnitude", "highest score")
SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4)
UNUSED = "*pooler*"  # of the bundled encoder: its mean pooling does not read it


def wanted(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run of the sweep, all methods of a seed first: a table that is interrupted is even."""
    shared = {
        "score_batches": arguments.score_batches,
        "batch_size": arguments.batch_size,
        "max_length": arguments.max_length,
        "balance": arguments.balance,
        "means": arguments.means,
        "bf16": arguments.bf16,
        "sets": arguments.eval_file,
    }
    runs = [{"method": "none", "share": 0.0, "seed": 0} | shared]
    for seed in range(1, arguments.seeds + 1):
        for share in SHARES[1:]:
            methods = [name for name in METHODS if name != "magnitude" or seed == 1]
            runs += [{"method": name, "share": share, "seed": seed} | shared for name in methods]
    return runs


def key(run: dict[str, Any]) -> str:
    """What makes two runs the same."""
    return json.dumps({name: value for name, value in run.items() if name not in ("scores", "removed")}, sort_keys=True)


class Sweep:
    """The whole encoder, its text and evaluation sets, and the scores of the latest seed."""

    def __init__(self, arguments: argparse.Namespace):
        from pycse.training.data import default_text
        from pycse.training.encoder import load_encoder
        from pycse.training.eval_sets import evaluation_sets
        from pycse.training.names import bundled_model

        self.encoder = load_encoder(bundled_model(), arguments.device)
        self.text = default_text()
        self.sets = evaluation_sets(tuple(arguments.eval_file))
        self.known: tuple[str, dict[str, torch.Tensor]] | None = None

    def scores(self, run: dict[str, Any]) -> dict[str, torch.Tensor]:
        """For every parameter what the method of a run goes by; the lowest goes."""
        if run["method"] == "magnitude":
            return {name: p.detach().abs() for name, p in self.encoder.named_parameters()}
        if run["method"] == "random":
            generator = torch.Generator().manual_seed(run["seed"])
            return {name: torch.rand(p.shape, generator=generator) for name, p in self.encoder.named_parameters()}
        scored = self.taylor(run)
        return scored if run["method"] == "lowest score" else {name: -value for name, value in scored.items()}

    def taylor(self, run: dict[str, Any]) -> dict[str, torch.Tensor]:
        from pycse.sparse import score
        from pycse.training.pruning import batches

        options = {
            name: run[name] for name in ("seed", "score_batches", "batch_size", "max_length", "balance", "means")
        }
        which = json.dumps(options)
        if self.known is None or self.known[0] != which:
            settings = Settings(**options, prunes=True)
            own_length = self.encoder.max_seq_length
            self.encoder.max_seq_length = settings.max_length
            found = score(
                self.encoder,
                batches(settings, self.text),
                run["balance"],
                run["means"],
                seed=run["seed"],
                progress=False,
            )
            self.encoder.max_seq_length = own_length
            self.known = which, found
        return self.known[1]

    def __call__(self, run: dict[str, Any]) -> dict[str, Any]:
        from pycse.sparse import sparsify
        from pycse.training.evaluate import evaluate

        encoder, removed = self.encoder, 0
        if run["share"]:
            encoder = copy.deepcopy(encoder)
            removed = sparsify(encoder, self.scores(run), run["share"], exclude=UNUSED, pattern="dense").removed
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=run["bf16"]):
            return run | {"removed": removed, "scores": evaluate(encoder, self.sets)}


def grouped(runs: list[dict[str, Any]], name: str, measure: str) -> dict[tuple[str, float], list[float]]:
    """(method, share) -> the values of its seeds; a share of 0 is every method's."""
    result: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        for method in METHODS if run["method"] == "none" else (run["method"],):
            result.setdefault((method, run["share"]), []).append(run["scores"][name][measure])
    return result


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, a table a set: Spearman times 100, mean and standard deviation of the seeds, and uniformity of the
    lowest."""
    parts = []
    for name in runs[0]["scores"]:
        spearman, uniformity = grouped(runs, name, "spearman"), grouped(runs, name, "uniformity")
        lines = [f"| {name}: removed | " + " | ".join(METHODS) + " | uniformity, lowest score |", "|---" * 6 + "|"]
        for share in SHARES:
            cells = [told([100 * v for v in spearman.get((method, share), [])], 1) for method in METHODS]
            cells.append(told(uniformity.get((METHODS[0], share), []), 2))
            lines.append(f"| {share:.0%} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def told(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def plot(runs: list[dict[str, Any]], path: str) -> None:
    """A panel a set: Spearman over the share removed, mean and range of the seeds."""
    from matplotlib.figure import Figure

    names = list(runs[0]["scores"])
    figure = Figure(figsize=(4.5 * len(names), 3.6), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        values = grouped(runs, name, "spearman")
        for method, color in zip(METHODS, ("tab:blue", "tab:gray", "tab:green", "tab:red")):
            shares = [share for share in SHARES if (method, share) in values]
            found = [values[method, share] for share in shares]
            x = [100 * share for share in shares]
            panel.plot(x, [statistics.mean(v) for v in found], marker="o", markersize=3, color=color, label=method)
            panel.fill_between(x, list(map(min, found)), list(map(max, found)), color=color, alpha=0.2, linewidth=0)
        panel.set_title(name)
        panel.set_xlabel("% of the weights removed")
        panel.set_ylabel("Spearman")
        panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=100)


def speed(arguments: argparse.Namespace) -> None:
    """Sentences a second of the whole encoder and of one with half of its neurons and heads, on the same token
    batches."""
    from pycse.sparse import sparsify

    sweep = Sweep(arguments)
    whole, half = sweep.encoder.eval(), copy.deepcopy(sweep.encoder)
    for granularity in ("neuron", "head"):
        scores = {name: p.detach().abs() for name, p in half.named_parameters()}
        print(f"{granularity}: {sparsify(half, scores, 0.5, granularity).summary()}")
    print(f"{machine()}\n\n| tokens a sentence | whole | half its neurons and heads | times |\n|---|---|---|---|")
    rows, generator = 64, torch.Generator().manual_seed(0)
    for length in (16, 32, 64, 128):
        ids = torch.randint(1000, 20000, (rows, length), generator=generator)
        features = {name: value.to(whole.device) for name, value in (("input_ids", ids), ("attention_mask", ids > 0))}
        with torch.inference_mode():
            calls = {
                name: lambda one=one, features=features: one(dict(features))
                for name, one in (("whole", whole), ("half", half))
            }
            times = interleaved(calls, budget=arguments.budget)
        rates = {name: rows / timing.best for name, timing in times.items()}
        print(
            f"| {length} | {rates['whole']:.0f} | {rates['half']:.0f} | {rates['half'] / rates['whole']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--eval-file", action="append", default=[], metavar="FILE", help="score, sentence1, sentence2 a line"
    )
    parser.add_argument("--seeds", type=int, default=3, help="1, 2, ...")
    parser.add_argument("--score-batches", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--balance", type=float, default=0.5)
    parser.add_argument("--means", default="global")
    parser.add_argument("--bf16", action="store_true", help="evaluate in bfloat16; scores are made in float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", metavar="FILE", help="one line a finished run; read again to go on")
    parser.add_argument("--picture", metavar="FILE", help="PNG to write")
    parser.add_argument("--speed", action="store_true", help="measure the encoder with half its neurons and heads")
    parser.add_argument("--budget", type=float, default=10.0, help="--speed: seconds a row of its table")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    arguments = parser.parse_args()
    quiet(local=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.speed:
        speed(arguments)
        return

    path = Path(arguments.json) if arguments.json else None
    known = {key(run): run for run in finished(path)}
    sweep, runs = None, []
    for run in wanted(arguments):
        done = known.get(key(run))
        if done is None:
            sweep = sweep or Sweep(arguments)
            done = sweep(run)
            if path:
                with path.open("a") as file:
                    file.write(json.dumps(done) + "\n")
            told_scores = ", ".join(f"{name} {scores['spearman']:.4f}" for name, scores in done["scores"].items())
            print(f"{run['method']}, {run['share']:.0%}, seed {run['seed']}: {told_scores}", flush=True)
        runs.append(done)
    print(f"\nSpearman x 100, mean ± standard deviation of {arguments.seeds} seeds\n\n{table(runs)}")
    if arguments.picture:
        plot(runs, arguments.picture)


if __name__ == "__main__":
    main()
