"""What `pycse eval` shows: encoders beside each other, and beside what papers have published."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pycse.training.evaluate import Embedded, Scores, check_ranking
from pycse.training.report import BETTER, number
from pycse.training.senteval import PUBLISHED, TASKS

if TYPE_CHECKING:
    from rich.table import Table
    from sentence_transformers import SentenceTransformer

    from pycse.training.eval_sets import ScoredPairs

MEAN = "avg."
AS_PUBLISHED = "Papers: BERT-base, trained without labels, as published"
PLANE = ("alignment", "uniformity")  # of STS-B


@dataclass
class Evaluated:
    """What an encoder scored.

    Fields:
        scores: on the Lee documents and files.
        senteval: task -> measures.
        parts: task -> subset -> Spearman.
    """

    model: str
    scores: Scores
    senteval: Scores = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Spearman of all seven tasks; None where one is missing."""
        if set(self.senteval) != set(TASKS):
            return None
        return sum(one["spearman"] for one in self.senteval.values()) / len(TASKS)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        found: dict[str, Any] = {"model": self.model, "scores": self.scores}
        if self.senteval:
            found["senteval"] = {"tasks": self.senteval, "mean": self.mean, "parts": self.parts}
        return found


def evaluated(
    model: str,
    encoder: SentenceTransformer,
    sets: list[ScoredPairs],
    tasks: list[ScoredPairs],
    **options: Any,
) -> Evaluated:
    """Scores of an encoder, which reads every distinct text of all sets and tasks once.

    Args:
        options: of :class:`pycse.training.evaluate.Embedded`.

    Raises:
        UserError: the encoder ranks nothing.
    """
    embedded = Embedded(encoder, [*sets, *tasks], **options)
    found = Evaluated(
        model,
        {one.name: embedded.measures(one) for one in sets},
        {one.name: embedded.measures(one) for one in tasks},
        {one.name: {part: embedded.part(one, part) for part in one.parts} for one in tasks if one.parts},
    )
    check_ranking(model, found.scores | found.senteval)
    return found


def senteval_table(found: list[Evaluated]) -> Table:
    """A row an encoder, then the papers': Spearman x 100 of the tasks."""
    from rich.table import Table

    table = Table(title="SentEval: Spearman x 100, all pairs of a task", title_justify="left", caption=AS_PUBLISHED)
    table.add_column("encoder", overflow="fold")
    for heading in (*TASKS, MEAN):
        table.add_column(heading, justify="right")
    for one in found:
        spearman = [one.senteval[task]["spearman"] if task in one.senteval else None for task in TASKS]
        table.add_row(one.model, *map(percent, [*spearman, one.mean]))
    table.add_section()
    for name, values in PUBLISHED.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


def plane_table(found: list[Evaluated]) -> Table:
    """Alignment of STS-B's pairs that people score above 4, uniformity of its texts."""
    from rich.table import Table

    table = Table(title="STS-B", title_justify="left")
    table.add_column("encoder", overflow="fold")
    for measure in PLANE:
        table.add_column(f"{measure} ({BETTER[measure]})", justify="right")
    for one in found:
        table.add_row(one.model, *(number(one.senteval["STS-B"].get(measure, math.nan)) for measure in PLANE))
    return table


def parts_table(found: list[Evaluated]) -> Table:
    """Every subset of the tasks; a column an encoder."""
    from rich.table import Table

    table = Table(title="SentEval: Spearman x 100 of each subset", title_justify="left")
    table.add_column("task")
    table.add_column("subset")
    for one in found:
        table.add_column(one.model, justify="right", overflow="fold")
    for task in found[0].senteval:
        parts = found[0].parts.get(task, {})
        for part in parts:
            table.add_row(task, part, *(percent(one.parts[task][part]) for one in found))
        table.add_row(task, "all", *(percent(one.senteval[task]["spearman"]) for one in found), style="bold")
        table.add_section()
    return table


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
