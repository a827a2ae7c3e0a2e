"""Checkpoints of a run: OUT/checkpoints/PHASE-STEP, a model that loads, and all that the training needs to go on.

A phase is a training of its own: "train", or "finetune" after a removal of parameters. A checkpoint is written under
another name and renamed: one that has its name is whole. The last two of a phase are kept, and the weights of the best
evaluation that any of them knows of, PHASE-best-STEP.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycse.training.choices import SAVE_MINUTES
from pycse.training.folder import STAGE, is_of_disk, rename
from pycse.training.progress import say

KEPT = 2


@dataclass
class Checkpoints:
    """Those of one phase.

    Fields:
        folder: OUT/checkpoints.
        phase: its name.
        steps: between two; None: by the clock, SAVE_MINUTES apart.
        best_of: file of a checkpoint -> step of the best evaluation that it knows of, or None.
    """

    folder: Path
    phase: str
    steps: int | None = None
    best_of: Callable[[Path], int | None] = lambda path: None
    saved: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Whether it is time for one."""
        if self.steps is not None:
            return step % self.steps == 0
        return time.monotonic() - self.saved >= 60 * SAVE_MINUTES

    def name(self, step: int) -> Path:
        return self.folder / f"{self.phase}-{step}"

    def best(self, step: int) -> Path:
        return self.folder / f"{self.phase}-best-{step}"

    def all(self) -> list[Path]:
        """Whole checkpoints, the latest last."""
        found = [path for path in self.folder.glob(f"{self.phase}-*") if path.name.rsplit("-", 1)[0] == self.phase]
        return sorted((path for path in found if path.name.rsplit("-", 1)[1].isdigit()), key=step_of)

    def latest(self) -> Path | None:
        return next(reversed(self.all()), None)

    @property
    def staging(self) -> Path:
        """Where the next one is written to."""
        return self.folder / f"{STAGE}{self.phase}"

    def begin(self) -> None:
        """One is being written, or tried to be: the clock starts anew, on every rank."""
        self.saved = time.monotonic()

    def stage(self) -> None:
        """Make that folder."""
        self.drop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.staging.mkdir()

    def drop(self) -> None:
        """Remove what is left there."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def take(self, name: str, step: int) -> None:
        """What was staged under this name is the checkpoint of this step; older ones go."""
        rename(self.staging / name if name else self.staging, self.name(step))
        kept = self.all()[-KEPT:]
        best = {self.best_of(path) for path in kept}
        for path in self.folder.glob(f"{self.phase}-*"):
            is_best = path.name.startswith(f"{self.phase}-best-")
            if path not in kept and not (is_best and step_of(path) in best):
                shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def guarded(save: Callable[[], object], console: Any, what: str = "a checkpoint could not be written") -> bool:
    """Whether something could be written. A full disk is said, and ends no training."""
    try:
        save()
        return True
    except Exception as error:
        if not is_of_disk(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        say(console, f"{what} ({reason}); the run goes on without", style="red")
        return False
