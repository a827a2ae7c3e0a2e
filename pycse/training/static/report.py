"""What a user sees of a static table: scores at every length, and the encoder that it stands beside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pycse.sparse.report import new_figure
from pycse.training.run import Static

if TYPE_CHECKING:
    from rich.table import Table


def lengths_table(static: Static) -> Table:
    """Spearman of every set at every length, before and after, and of the encoder; the size of such a table."""
    from rich.table import Table

    name, beside = static.beside
    table = Table(title="Spearman at each length (truncate_dim)", title_justify="left")
    table.add_column("length", justify="right")
    for known in beside:
        table.add_column(f"{known}, before", justify="right")
        table.add_column("after", justify="right")
    table.add_column("table, MB", justify="right")
    for length in sorted(static.after, reverse=True):
        cells = []
        for known in beside:
            cells += [f"{scores[length][known]['spearman']:.4f}" for scores in (static.before, static.after)]
        table.add_row(str(length), *cells, f"{4e-6 * static.tokens * length:.1f}")
    table.add_section()
    table.add_row(name, *(cell for known in beside for cell in ("", f"{beside[known]['spearman']:.4f}")), "")
    return table


def beside_table(static: Static) -> Table:
    """Size and speed beside the encoder's."""
    from rich.table import Table

    table = Table(title="Size and speed", title_justify="left")
    for heading in ("", "static", static.beside[0], "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    own, other = static.size["static"], static.size["encoder"]
    for name, key, form in (
        ("weights on disk, MB", "megabytes", ".1f"),
        ("sentences a second", "sentences_a_second", ",.0f"),
    ):
        table.add_row(name, f"{own[key]:{form}}", f"{other[key]:{form}}", f"{own[key] / other[key]:.2f}")
    return table


def plot_lengths(static: Static, path: Path) -> None:
    """Write a PNG: Spearman over the length, of every set; the encoder's as a dashed line."""
    name, beside = static.beside
    lengths = sorted(static.after)
    figure = new_figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    for k, known in enumerate(beside):
        colour = f"C{k}"
        values = [static.after[length][known]["spearman"] for length in lengths]
        panel.plot(lengths, values, color=colour, marker="o", label=known)
        values = [static.before[length][known]["spearman"] for length in lengths]
        panel.plot(lengths, values, color=colour, marker=".", linewidth=0.8, alpha=0.5, label=f"{known}, before")
        panel.axhline(beside[known]["spearman"], color=colour, linestyle="--", linewidth=1, label=f"{known}, {name}")
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.set_xlabel("length that embeddings are cut at")
    panel.set_ylabel("Spearman")
    panel.set_title(f"static table, {static.start}", fontsize="small", wrap=True)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def as_dict(static: Static) -> dict:
    """For metrics.json."""
    name, scores = static.beside
    return {
        "tokens": static.tokens,
        "width": static.width,
        "start": static.start,
        "lengths": [
            {"length": length, "before": static.before[length], "after": static.after[length]}
            for length in sorted(static.after, reverse=True)
        ],
        "beside": {"name": name, "scores": scores},
        "size": static.size,
    }
