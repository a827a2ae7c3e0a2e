"""How far a training is: a bar on a terminal; elsewhere, in a file or a pipe, a plain line every so often."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

EVERY = 15.0  # seconds between plain lines


class Lines:
    """Plain lines: the first step, then every EVERY seconds, each score, and the last step."""

    def __init__(self, console: Any, steps: int, rows: int, done: int = 0):
        self.console, self.steps, self.rows, self.begun = console, steps, rows, done
        self.started = self.marked = time.monotonic()
        self.stepping, self.counted = 0.0, 0  # seconds of steps without their evaluations, and those steps
        self.said, self.loss, self.step = 0.0, "", done

    def update(self, step: int, loss: str = "", score: str = "") -> None:
        now = time.monotonic()
        if step > self.step and not score:
            self.stepping, self.counted = self.stepping + now - self.marked, self.counted + step - self.step
        self.marked = now
        self.step, self.loss = step, loss or self.loss
        if not score and now - self.said < EVERY and step < self.steps:
            return
        self.said = now
        took = now - self.started
        parts = [f"step {step}/{self.steps}", self.loss, score]
        if self.counted and self.stepping > 0:
            parts.append(f"{self.rows * self.counted / self.stepping:.0f} rows/s")
            parts.append(f"{clock((self.steps - step) * took / (step - self.begun))} left")
        say(self.console, ", ".join(part for part in parts if part))


class Bar:
    """A rich progress bar."""

    def __init__(self, progress: Any, steps: int, done: int):
        self.progress = progress
        self.task = progress.add_task("training", total=steps, completed=done, loss="", score="")

    def update(self, step: int, loss: str = "", score: str = "") -> None:
        fields = {name: value for name, value in (("loss", loss), ("score", score)) if value}
        self.progress.update(self.task, completed=step, **fields)


@contextmanager
def shown(console: Any, steps: int, rows: int, done: int = 0) -> Iterator[Bar | Lines]:
    """Something with ``update(step, loss, score)``.

    Args:
        rows: of a step, for the speed.
        done: steps of an earlier part of the run.
    """
    if not console.is_terminal:
        yield Lines(console, steps, rows, done)
        return
    from rich import progress as bar

    columns = (
        bar.TextColumn("training"),
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TimeElapsedColumn(),
        bar.TimeRemainingColumn(),
        bar.TextColumn("{task.fields[loss]}  {task.fields[score]}"),
    )
    with bar.Progress(*columns, console=console) as progress:
        yield Bar(progress, steps, done)


def say(console: Any, text: str, **style: Any) -> None:
    """Print a line of a training. Where nobody reads any more (a closed pipe or terminal) the training goes on."""
    with suppress(OSError, SystemExit):  # rich makes the latter of a closed pipe
        console.print(text, **style)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
