"""What a user sees of a run: tables, the loss curve on the terminal, a PNG of the curves, metrics.json."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycse.sparse.report import new_figure
from pycse.training import ranks
from pycse.training.data import Text
from pycse.training.errors import Failed, UserError
from pycse.training.evaluate import BINS, MEASURES, Scores, no_ranking
from pycse.training.folder import Folder, of_disk, save_or_rescue, write_text
from pycse.training.resume import PACKAGES, installed
from pycse.training.run import Pruned, Run
from pycse.training.static import report as of_static

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pycse.training.eval_sets import ScoredPairs

BETTER = {"spearman": "higher is better", "alignment": "lower is better", "uniformity": "lower is better"}


def write(run: Run, out: Path) -> None:
    """Write metrics.json, then the pictures, of a finished run to its folder."""
    with of_disk(f"in {out}"):
        write_metrics(run, out / "metrics.json")
        if run.loss:
            plot(run, out / "curves.png")
        if run.pruned:
            run.pruned.report.plot(out / "layers.png")
        if run.static:
            of_static.plot_lengths(run.static, out / "lengths.png")


def show(run: Run, out: Path, console: Console) -> None:
    """Print the tables and the loss curve of a finished run."""
    if run.loss:
        console.print(loss_curve(run, console.width))
    console.print(scores_table(score_columns(run)))
    if run.static:
        console.print(of_static.lengths_table(run.static))
        if {"static", "encoder"} <= run.static.size.keys():
            console.print(of_static.beside_table(run.static))
    if run.pruned and run.pruned.size:
        console.print(size_table(run.pruned))
    fine, sentence = verdict(run.before, run.after)
    console.print(sentence, style="green" if fine else "bold red")
    console.print(run_table(run, out))


def end(run: Run, folder: Folder, save: Callable[[Path], None], started: float) -> None:
    """The end of a run, by rank 0: the model, metrics.json, the pictures. Where the model cannot have its place, the
    rest is written all the same."""
    run.seconds["total"] = time.perf_counter() - started + run.earlier
    try:
        save_or_rescue(save, folder.path / "model")
    except UserError as error:
        run.failed = str(error)
        with suppress(OSError):
            write_metrics(run, folder.path / "metrics.json")
        raise
    write(run, folder.path)


@contextmanager
def recorded(run: Run, out: Path) -> Iterator[None]:
    """A run that fails leaves what it has found out, in metrics.json."""
    try:
        yield
    except Failed as error:
        run.failed = str(error)
        if ranks.first():
            with suppress(OSError):
                write_metrics(run, out / "metrics.json")
        raise


def score_columns(run: Run) -> dict[str, Scores]:
    """Heading -> scores, in the order of what was done."""
    if run.pruned is None:
        return {"before": run.before, "after": run.after}
    columns = {"before": run.before, "trained": run.pruned.dense, "sparse": run.pruned.sparse}
    if run.pruned.dense is run.before:
        del columns["trained"]
    return columns | ({"fine-tuned": run.pruned.tuned} if run.pruned.tuned else {})


def size_table(pruned: Pruned) -> Table:
    """What the removal did to parameters, files and speed."""
    from rich.table import Table

    table = Table(title="Size and speed", title_justify="left")
    for heading in ("", "before", "after", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    before, after = pruned.size["before"], pruned.size["after"]
    for name, key, form in (
        ("parameters", "parameters", ",.0f"),
        ("parameters that are not 0", "nonzero", ",.0f"),
        ("weights and masks on disk, MB", "megabytes", ".1f"),
        ("sentences a second", "sentences_a_second", ".0f"),
    ):
        table.add_row(name, f"{before[key]:{form}}", f"{after[key]:{form}}", f"{after[key] / before[key]:.2f}")
    return table


def text_table(text: Text, sets: Sequence[ScoredPairs] = ()) -> Table:
    """What was kept of the text, and what was dropped and why; and of evaluation sets."""
    from rich.table import Table

    title = f"Text: {text.source}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_row(f"kept: {text.unit}", f"{len(text.rows):,}", style="bold")
    for place, name in zip(text.columns, text.taken):
        table.add_row(f"{place.replace('_', ' ')}: {name}", "")
    if text.left_out:
        table.add_row(f"columns left out: {', '.join(text.left_out)}", "")
    if repeated := text.repeated:
        table.add_row("texts in several rows, never negatives of each other", f"{repeated:,}")
    for reason, count in text.dropped.most_common():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    for pairs in sets:
        if pairs.skipped:
            table.add_row(f"evaluation set {pairs.name}: pairs without a score", f"{pairs.skipped:,}")
    return table


def run_table(run: Run, out: Path) -> Table:
    """What was trained and how."""
    from rich.table import Table

    settings = run.settings
    table = Table(title="Run", title_justify="left", show_header=False)
    options = ", ".join(f"{name} {value}" for name, value in settings.loss_arguments().items() if value is not None)
    what, shape = run.shape.split(" ", 1)
    rows = [("start" if run.static else "encoder", run.model)]
    rows.append((what, f"{shape}; {run.parameters / 1e6:.1f} M parameters"))
    if run.loss:
        rows += [("teacher", teacher_line(teacher)) for teacher in run.teachers]
        if run.static:
            options += f", dims {','.join(map(str, settings.lengths))}"
        rows += [("loss", f"{settings.recipe}: {options}")]
        rows += [("", part) for part in part_lines(run)]
        batch = f"{settings.batch_size}"
        if run.processes > 1:
            batch += f" a process, {settings.batch_size * run.processes} in all"
        tokens = f"at most {settings.max_length} tokens"
        if settings.grad_accumulation > 1:
            batch += f", {settings.grad_accumulation} batches a step"
        rows.append(("steps", f"{run.steps} of {batch}, {tokens}, lr {settings.learning_rate:g}, seed {settings.seed}"))
        if run.stopped:
            rows.append(("stopped", run.stopped))
        if run.kept is not None:
            rows.append(("weights", f"of step {run.kept}, the best evaluation"))
    if run.pruned:
        rows += [("removed", run.pruned.report.summary())]
    training = f"{run.seconds['train']:.0f} s training with its evaluations, " if "train" in run.seconds else ""
    processes = f", {run.processes} processes" if run.processes > 1 else ""
    rows += [
        ("device", run.device + processes + (", bf16" if settings.bf16 else "")),
        ("time", f"{training}{run.seconds['total']:.0f} s in all"),
        ("written to", f"{out}: {', '.join(written(run))}"),
    ]
    if run.static:
        rows.append(("to load", f"SentenceTransformer({str(out / 'model')!r}, truncate_dim={min(run.static.after)})"))
    if run.pruned:
        rows.append(("to load", f"pycse.sparse.load({str(out / 'model')!r}), or as a model for pycse eval and train"))
    for name, value in rows:
        table.add_row(name, value)
    return table


def written(run: Run) -> list[str]:
    """What a run leaves in its folder."""
    pictures = {"curves.png": run.loss, "layers.png": run.pruned, "lengths.png": run.static}
    return ["model/", "metrics.json", *(name for name, shown in pictures.items() if shown), "run.toml"]


def teacher_line(teacher: dict) -> str:
    """One teacher of the run in words."""
    line = f"{teacher['name']}: {teacher['width']} wide, {teacher['parameters'] / 1e6:.1f} M parameters"
    if teacher["cache"] is None:
        return line
    return f"{line}; {teacher['from_cache']:,} embeddings from the cache, {teacher['embedded']:,} made"


def part_lines(run: Run) -> list[str]:
    """Where each part of the loss began and ended: means of the first and the last tenth of the steps."""
    lines = []
    for name, values in run.parts.items():
        n = max(1, len(values) // 10)
        lines.append(f"{name} {sum(values[:n]) / n:.3f} -> {sum(values[-n:]) / n:.3f}")
    return lines


def scores_table(columns: dict[str, Scores], title: str = "Evaluation", change: bool = True) -> Table:
    """Scores side by side: {"before": ..., "after": ...}, or one column. With two, their difference is added, unless
    there is no ``change``."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("set")
    table.add_column("measure")
    change = change and len(columns) == 2
    headings = list(columns) + (["change"] if change else [])
    for heading in headings:
        table.add_column(heading, justify="right")
    for name in next(iter(columns.values())):
        for measure in MEASURES:
            values = [scores[name][measure] for scores in columns.values() if measure in scores[name]]
            if not values:
                continue
            cells = [number(value) for value in values]
            if change:
                gain = values[1] - values[0]
                cells.append("none" if math.isnan(gain) else f"{gain:+.4f}")
            table.add_row(name, f"{measure} ({BETTER[measure]})", *cells)
        table.add_section()
    return table


def verdict(before: Scores, after: Scores) -> tuple[bool, str]:
    """(no Spearman fell, one sentence in plain words about what the run did to the Spearman scores)."""
    better: list[str] = []
    worse: list[str] = []
    for name, scores in before.items():
        old, new = scores["spearman"], after[name]["spearman"]
        phrase = f"{name} ({number(old)} -> {number(new)})"
        # Not `new < old`: a score that is not a number is no success either, but it is less than one that is.
        (better if new > old or (math.isnan(old) and not math.isnan(new)) else worse).append(phrase)
    if not worse:
        return True, f"The run made the model better on {', '.join(better)}."
    sentence = f"The run made the model worse, or no better, on {', '.join(worse)}"
    sentence += f", and better on {', '.join(better)}." if better else "."
    why = no_ranking(after)
    return False, sentence + (f" Now {why}." if why else "")


def number(score: float) -> str:
    return "none" if math.isnan(score) else f"{score:.4f}"


def loss_curve(run: Run, width: int) -> str:
    """The loss over the steps, drawn with characters."""
    import plotext

    steps, losses = zip(*[one for one in run.loss if math.isfinite(one[1])], strict=True)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(max(40, min(width, 100)), 15)
    figure.title(f"loss over {run.steps} steps")
    figure.draw(figure.signal(list(steps), list(losses), marker="braille").lines())
    if wide(losses):
        figure.ruler("y", "left").scale("log")
    return plotext.uncolorize(str(figure.build()))


def wide(losses) -> bool:
    """Whether a logarithmic axis shows more."""
    return 0 < min(losses) < max(losses) / 100


def plot(run: Run, path: Path) -> None:
    """Write a PNG: the loss, and the Spearman, alignment and uniformity of every set, over the steps."""
    figure = new_figure(figsize=(15, 7), layout="constrained")
    panels = dict(zip(("loss", "spearman", "plane", *MEASURES[1:], "similarities"), figure.subplots(2, 3).flat))
    steps, losses = zip(*run.loss, strict=True)
    panels["loss"].plot(steps, losses, linewidth=1, label="loss")
    for name, values in run.parts.items():
        panels["loss"].plot(steps, values, linewidth=1, label=name)
    if wide(losses):
        panels["loss"].set_yscale("log")
    if run.parts:
        panels["loss"].legend()
    panels["loss"].set_title(f"loss ({run.settings.recipe})")
    for measure in MEASURES:
        for name in run.before:
            points = [(step, scores[name][measure]) for step, scores in run.scores if measure in scores[name]]
            if points:
                panels[measure].plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panels[measure].set_title(f"{measure} ({BETTER[measure]})")
        panels[measure].legend()
    plot_plane(run, panels["plane"])
    plot_similarities(run, panels["similarities"])
    for name, panel in panels.items():
        if name in ("loss", *MEASURES):
            panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.suptitle(f"{run.model}, {run.shape}")
    figure.savefig(path, dpi=120)


def plot_plane(run: Run, panel: Any) -> None:
    """Alignment over uniformity, from the start (a ring) to the end (a dot): the lower left is better."""
    for k, name in enumerate(run.before):
        points = [
            (one[name]["uniformity"], one[name]["alignment"])
            for _, one in run.scores
            if {"uniformity", "alignment"} <= one[name].keys()
        ]
        if points:
            x, y = zip(*points, strict=True)
            panel.plot(x, y, linewidth=1, color=f"C{k}", label=name)
            panel.plot(x[:1], y[:1], "o", color=f"C{k}", markerfacecolor="none")
            panel.plot(x[-1:], y[-1:], "o", color=f"C{k}")
    panel.set(title="alignment and uniformity (lower left is better)", xlabel="uniformity", ylabel="alignment")
    if panel.lines:
        panel.legend()


def plot_similarities(run: Run, panel: Any) -> None:
    """Shares of the first set's pairs at each cosine, similar ones and others, before and after."""
    edges = [-1 + 2 * k / BINS for k in range(BINS + 1)]
    for when, style in (("before", "--"), ("after", "-")):
        for colour, (kind, counts) in enumerate(run.similarities.get(when, {}).items()):
            if total := sum(counts):
                shares = [count / total for count in counts]
                panel.stairs(shares, edges, linestyle=style, color=f"C{colour}", label=f"{kind}, {when}")
    panel.set(title=f"cosines of {next(iter(run.before), '')}: similar pairs and others", xlabel="cosine")
    if run.similarities:
        panel.legend()


def write_metrics(run: Run, path: Path) -> None:
    """Write metrics.json: settings, versions, counts, scores before and after, and the whole history."""
    fine, sentence = verdict(run.before, run.after) if not run.failed else (False, run.failed)
    metrics = {
        "settings": run.settings.as_dict(),
        "versions": {name: installed(name) for name in PACKAGES},
        "model": {
            "name": run.model,
            "layers": run.layers,
            "layers_before": run.layers_before,
            "parameters": run.parameters,
        },
        "teachers": run.teachers,
        "device": run.device,
        **({"processes": run.processes} if run.processes > 1 else {}),
        "steps": run.steps,
        **({"stopped": run.stopped} if run.stopped else {}),
        **({"kept_step": run.kept} if run.kept is not None else {}),
        **({"failed": run.failed} if run.failed else {}),
        "text": {
            "source": run.text.source,
            "columns": list(run.text.columns),
            "taken": list(run.text.taken),
            "left_out": list(run.text.left_out),
            "repeated": run.text.repeated,
            "kept": len(run.text.rows),
            "dropped": dict(run.text.dropped.most_common()),
        },
        "before": run.before,
        "after": run.after,
        "better": fine,
        "verdict": sentence,
        "history": {
            "loss": [
                {"step": step, "loss": loss}
                | (dict(zip(("learning_rate", "gradient"), run.rates[i])) if run.rates else {})
                | {name: values[i] for name, values in run.parts.items()}
                for i, (step, loss) in enumerate(run.loss)
            ],
            "scores": [{"step": step, "scores": scores} for step, scores in run.scores],
        },
        "similarities": run.similarities,
        "rows_a_second": rows_a_second(run),
        "seconds": run.seconds,
    }
    if run.static:
        metrics["static"] = of_static.as_dict(run.static)
    if run.pruned:
        metrics["pruning"] = {
            "report": run.pruned.report.as_dict(),
            "dense": run.pruned.dense,
            "sparse": run.pruned.sparse,
            "tuned": run.pruned.tuned,
            "size": run.pruned.size,
        }
    write_json(metrics, path)


def json_text(value) -> str:
    """JSON that every reader takes: what is not finite becomes null."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def rows_a_second(run: Run) -> float | None:
    """Of the training, without its evaluations: by the median step of this part of the run."""
    steps = [after - before for before, after in zip(run.step_ends, run.step_ends[1:])]
    settings = run.settings
    rows = settings.batch_size * settings.grad_accumulation * run.processes
    return rows / statistics.median(steps) if steps else None


def write_json(value, path: Path) -> None:
    write_text(path, json_text(value))


def finite(value):
    """The same nested value, with None for NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
