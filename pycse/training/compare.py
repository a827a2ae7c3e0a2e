"""Runs side by side: what was set differently, and what came out, seeds of the same settings together."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycse.training.errors import UserError
from pycse.training.settings import FIELDS

if TYPE_CHECKING:
    from rich.table import Table

# Settings that make no other run.
OWN = ("seed", "cache_teachers", *(name for name, known in FIELDS.items() if known.session))


@dataclass
class Group:
    """Runs of the same settings but for the seed.

    Fields:
        names: their folders.
        metrics: their metrics.json.
        settings: what they share.
    """

    names: list[str]
    metrics: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} and {len(self.names) - 1} more"


def read_run(folder: str) -> dict[str, Any]:
    """metrics.json of a run; UserError where there is none."""
    path = Path(os.path.expanduser(folder))
    try:
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        metrics["settings"], metrics["after"], metrics["history"]
    except FileNotFoundError:
        hint = "; it has not ended, see --resume" if (path / "run.json").exists() else ""
        raise UserError(f"{folder} has no metrics.json{hint}; give folders of runs of pycse train") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: cannot use metrics.json ({error}); give folders of runs of pycse train") from error
    return metrics


def grouped(folders: list[str]) -> list[Group]:
    """Runs by their settings, in the order given."""
    groups: dict[str, Group] = {}
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is given {folders.count(folder)} times; give each run once")
        metrics = read_run(folder)
        settings = {name: value for name, value in metrics["settings"].items() if name not in OWN}
        key = json.dumps([settings, metrics.get("model")], sort_keys=True)
        group = groups.setdefault(key, Group([], [], settings))
        group.names.append(folder)
        group.metrics.append(metrics)
    return list(groups.values())


def differing(groups: list[Group]) -> list[str]:
    """Settings that are not the same in all groups."""
    names = dict.fromkeys(name for group in groups for name in group.settings)
    return [name for name in names if len({json.dumps(group.settings.get(name)) for group in groups}) > 1]


def scores(group: Group) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(set, measure) -> (mean, deviation over the seeds; None of one run) after the run."""
    found: dict[tuple[str, str], list[float]] = {}
    for metrics in group.metrics:
        for name, measures in metrics["after"].items():
            for measure, value in measures.items():
                if value is not None:
                    found.setdefault((name, measure), []).append(value)
    return {
        key: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
        for key, values in found.items()
    }


def table(groups: list[Group]) -> Table:
    """Settings that differ first, then scores, seeds, and time; a column a group."""
    from rich.table import Table

    from pycse.training.report import BETTER

    out = Table(title="Runs", title_justify="left")
    out.add_column("")
    for group in groups:
        out.add_column(group.name, justify="right", overflow="fold")
    for name in differing(groups):
        out.add_row(name.replace("_", "-"), *(shown(group.settings.get(name)) for group in groups))
    if any(len(group.names) > 1 for group in groups) or len({seeds(group) for group in groups}) > 1:
        out.add_row("seeds", *(seeds(group) for group in groups))
    out.add_section()
    every = [scores(group) for group in groups]
    for key in dict.fromkeys(key for one in every for key in one):
        values = [one[key][0] for one in every if key in one]
        better = max(values) if key[1] == "spearman" else min(values)
        cells = []
        for one in every:
            if key not in one:
                cells.append("")
                continue
            mean, spread = one[key]
            text = f"{mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
            cells.append(f"{text} *" if mean == better and len(groups) > 1 else text)
        out.add_row(f"{key[0]}: {key[1]} ({BETTER.get(key[1], '')})", *cells)
    out.add_section()
    out.add_row("steps", *(shown(group.metrics[0].get("steps")) for group in groups))
    out.add_row("seconds", *(taken(group) for group in groups))
    failed = [next((m["failed"] for m in group.metrics if m.get("failed")), "") for group in groups]
    if any(failed):
        out.add_row("failed", *failed)
    return out


def taken(group: Group) -> str:
    """Seconds, where the runs ended."""
    known = [metrics["seconds"]["total"] for metrics in group.metrics if "total" in metrics.get("seconds", {})]
    return f"{statistics.mean(known):.0f}" if known else ""


def seeds(group: Group) -> str:
    return ", ".join(shown(metrics["settings"].get("seed")) for metrics in group.metrics)


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def as_dict(groups: list[Group]) -> dict[str, Any]:
    """For --json."""
    names = differing(groups)
    return {
        "differing": names,
        "runs": [
            {
                "folders": group.names,
                "settings": {name: group.settings.get(name) for name in names},
                "seeds": [metrics["settings"].get("seed") for metrics in group.metrics],
                "scores": [
                    {"set": name, "measure": measure, "mean": mean, "deviation": spread}
                    for (name, measure), (mean, spread) in scores(group).items()
                ],
            }
            for group in groups
        ],
    }


def plot(groups: list[Group], file: Any) -> None:
    """Write a PNG: the loss, and every set's Spearman over the steps; a colour a group, a line a run."""
    from pycse.sparse.report import new_figure

    names = list(dict.fromkeys(name for group in groups for metrics in group.metrics for name in metrics["after"]))
    figure = new_figure(figsize=(5 * (1 + len(names)), 4.5), layout="constrained")
    panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    for k, group in enumerate(groups):
        for i, metrics in enumerate(group.metrics):
            style = {"color": f"C{k % 10}", "label": group.name if i == 0 else None}
            history = metrics["history"]
            points = [(one["step"], one["loss"]) for one in history["loss"] if one["loss"] is not None]
            if points:
                panels[0].plot(*zip(*points), linewidth=1, **style)
            for panel, name in zip(panels[1:], names):
                found = [
                    (one["step"], one["scores"][name]["spearman"])
                    for one in history["scores"]
                    if one["scores"].get(name, {}).get("spearman") is not None
                ]
                if found:
                    panel.plot(*zip(*found), marker="o", markersize=3, **style)
    for panel, title in zip(panels, ["loss", *(f"{name}: spearman (higher is better)" for name in names)]):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    figure.savefig(file, dpi=120, format="png")
