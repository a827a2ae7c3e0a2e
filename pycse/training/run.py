"""What a run found out; report.py shows it and writes metrics.json from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pycse.sparse.report import Report
from pycse.training.data import Text
from pycse.training.evaluate import Histogram, Scores
from pycse.training.settings import Settings


@dataclass
class Pruned:
    """What removing parameters did.

    Fields:
        report: of pycse.sparse.sparsify.
        dense, sparse, tuned: scores before, after the removal, and after training what is left (None: it was not).
        size: "before" and "after" -> parameters, nonzero, megabytes, sentences_a_second.
    """

    report: Report
    dense: Scores
    sparse: Scores
    tuned: Scores | None = None
    size: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def final(self) -> Scores:
        return self.tuned or self.sparse


@dataclass
class Static:
    """What the training of a static table did.

    Fields:
        tokens, width: the table's rows and features.
        start: where its rows came from, for people to read.
        before, after: length -> scores.
        beside: name of the encoder that it stands beside, and that encoder's scores.
        size: "static" and "encoder" -> megabytes, sentences_a_second.
    """

    tokens: int
    width: int
    start: str
    before: dict[int, Scores] = field(default_factory=dict)
    after: dict[int, Scores] = field(default_factory=dict)
    beside: tuple[str, Scores] = ("", {})
    size: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Run:
    """A training run, or a removal of parameters with what followed it."""

    settings: Settings
    text: Text
    model: str
    layers: list[int]
    layers_before: int
    parameters: int
    device: str
    steps: int
    processes: int = 1
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)
    similarities: dict[str, Histogram] = field(default_factory=dict)  # "before" and "after", of the first set
    step_ends: list[float] = field(default_factory=list)  # of time.perf_counter, in this process
    loss: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    rates: list[tuple[float, float]] = field(default_factory=list)  # (learning rate, length of the gradient) a step
    scores: list[tuple[int, Scores]] = field(default_factory=list)  # (step, scores), step 0 first
    teachers: list[dict] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)  # part of the loss -> a value a step
    seconds: dict[str, float] = field(default_factory=dict)
    pruned: Pruned | None = None
    static: Static | None = None
    more_to_come: bool = False  # a phase after this one starts from its end
    stopped: str = ""  # why, where it ended before its last step
    kept: int | None = None  # step of the weights that were kept, where they are not the last
    failed: str = ""  # what went wrong
    earlier: float = 0.0  # seconds of training before the run was stopped

    @property
    def shape(self) -> str:
        """What was trained, in words."""
        if self.static is not None:
            return f"table {self.static.tokens:,} tokens x {self.static.width}"
        return f"layers {','.join(map(str, self.layers))} of {self.layers_before}"

    def another(self, steps: int) -> Run:
        """A run of as many steps that goes on with the same encoder, with nothing found out yet."""
        return Run(
            self.settings, self.text, self.model, self.layers, self.layers_before, self.parameters, self.device, steps,
            self.processes,
        )  # fmt: skip

    def follow(self, later: Run) -> None:
        """Take in a run that went on with the same encoder."""
        self.loss += [(self.steps + step, loss) for step, loss in later.loss]
        self.rates += later.rates
        self.step_ends += later.step_ends
        self.kept = None if later.kept is None else self.steps + later.kept
        self.stopped = later.stopped or self.stopped
        self.earlier += later.earlier
        if "after" in later.similarities:
            self.similarities["after"] = later.similarities["after"]
        self.scores += [(self.steps + step, scores) for step, scores in later.scores]
        for name, values in later.parts.items():
            self.parts.setdefault(name, []).extend(values)
        self.seconds["train"] += later.seconds.get("train", 0.0)
        self.steps += later.steps
