"""What a run would take: a few of its steps, timed."""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pycse.training import ranks
from pycse.training.choices import EVALUATIONS
from pycse.training.errors import Failed
from pycse.training.eval_sets import ScoredPairs
from pycse.training.evaluate import evaluate
from pycse.training.fit import fit
from pycse.training.folder import WORK
from pycse.training.progress import clock
from pycse.training.run import Run
from pycse.training.signals import Interrupted

if TYPE_CHECKING:
    from rich.table import Table

STEPS = 4  # the first, which warms up, is not counted


def estimate(run: Run, encoder: Any, loss: Any, sets: list[ScoredPairs], steps: int) -> Table:
    """A table of time and memory. The encoder and the loss have been trained a little afterwards.

    Args:
        steps: of all trainings of the run.
    """
    from rich.console import Console
    from rich.table import Table

    settings = run.settings
    begun = time.perf_counter()
    evaluate(encoder, sets, settings.eval_batch_size, encoder.max_seq_length, settings.prompts)
    evaluating = time.perf_counter() - begun
    never = 10**9
    trial = run.another(STEPS)
    trial.settings = replace(
        settings, eval_steps=never, save_steps=never, keep="last", best_by=None, patience=None, report_to=()
    )
    with tempfile.TemporaryDirectory(prefix="pycse-") as scratch:
        (Path(scratch) / WORK).mkdir()
        try:
            fit(trial, encoder, loss, sets, Path(scratch), Console(quiet=True))
        except Failed as error:
            raise Failed(str(error).split(" The weights")[0]) from None
        except Interrupted as error:
            raise Interrupted(error.number) from None
    step = statistics.median(b - a for a, b in zip(trial.step_ends, trial.step_ends[1:]))
    evaluations = 2 + run.steps // (settings.eval_steps or max(1, run.steps // EVALUATIONS))
    table = Table(title="What this run would take", title_justify="left", show_header=False)
    rows = settings.batch_size * settings.grad_accumulation * run.processes
    for name, value in (
        ("a step", f"{step:.2f} s, {rows / step:.0f} rows a second"),
        ("steps", f"{steps}: {clock(step * steps)}"),
        ("evaluations", f"{evaluations} of {evaluating:.1f} s: {clock(evaluating * evaluations)}"),
        ("in all", f"about {clock(step * steps + evaluating * evaluations)}, without loading and saving"),
        ("memory", memory(encoder.device)),
        ("written", "nothing"),
    ):
        table.add_row(name, value)
    return table


def memory(device: torch.device) -> str:
    """The most that this process has held."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of the GPU, at the most"
    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    each = " a process" if ranks.size() > 1 else ""
    return f"{held:.1f} GB{each}, at the most"
