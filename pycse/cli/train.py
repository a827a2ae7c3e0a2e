"""`pycse train`."""

from __future__ import annotations

from typing import Any

from pycse.cli.app import app
from pycse.cli.from_settings import settings_of, with_settings
from pycse.cli.shared import already_ended, finish, is_local, quiet, reported
from pycse.training import ranks
from pycse.training.errors import require_extras


@app.command()
@with_settings("train")
def train(**options: Any) -> None:
    """Train a sentence encoder and evaluate it before and after.

    Writes model/, metrics.json and curves.png to the output folder, and nothing elsewhere but in --cache-teachers. With
    the defaults it needs no network. Several processes train one model together, with the same options: torchrun
    --nproc-per-node 2 -m pycse train.
    """
    with reported("train"):
        with ranks.together():
            settings = settings_of(options)
            settings.check()
            require_extras()
            quiet(is_local(settings.init or settings.model, settings.teachers))

        from rich.console import Console

        from pycse.training import report
        from pycse.training.train import train as run_training

        console = Console(markup=False, highlight=False)  # square brackets in file names are no markup
        if already_ended(settings, console):
            return
        done = run_training(settings, console)
        if done is None:
            ranks.leave()
            return
        run, folder = done
        finish(lambda: report.show(run, folder, console))
