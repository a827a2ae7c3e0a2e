"""`pycse sparsify`."""

from __future__ import annotations

from typing import Any

from pycse.cli.app import app
from pycse.cli.from_settings import settings_of, with_settings
from pycse.cli.shared import already_ended, finish, is_local, quiet, reported
from pycse.training import ranks
from pycse.training.errors import UserError, require_extras
from pycse.training.recipes import RECIPES


@app.command()
@with_settings("sparsify", argument="model")
def sparsify(**options: Any) -> None:
    """Remove the parameters that contribute least to alignment and uniformity, and evaluate before and after.

    Writes model/ (for pycse.sparse.load), metrics.json and layers.png to the output folder, and with --finetune-steps
    curves.png. With the defaults it needs no network.
    """
    with reported("sparsify"):
        with ranks.together():
            settings = settings_of(options, layers="all", prunes=True)
            if settings.recipe in RECIPES and RECIPES[settings.recipe].prunes:
                raise UserError(
                    f"--recipe {settings.recipe} removes parameters itself; use it with pycse train, or another here"
                )
            settings.check()
            require_extras()
            quiet(is_local(settings.model))

        from rich.console import Console

        from pycse.training import report
        from pycse.training.pruning import sparsify_run

        console = Console(markup=False, highlight=False)
        if already_ended(settings, console):
            return
        run, folder = sparsify_run(settings, console)
        finish(lambda: report.show(run, folder, console))
