"""`pycse compare`."""

from __future__ import annotations

import json as as_json
from typing import Annotated

import typer

from pycse.cli.app import app
from pycse.cli.shared import reported
from pycse.training import ranks
from pycse.training.errors import require_extras
from pycse.training.new_file import check_new, new_file


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs of pycse train or sparsify.", metavar="RUN...")],
    picture: Annotated[
        str | None, typer.Option(help="New PNG: losses and Spearman over the steps.", metavar="FILE")
    ] = None,
    json: Annotated[
        str | None, typer.Option(help="New file to write the comparison to as well.", metavar="FILE")
    ] = None,
) -> None:
    """Put runs side by side: settings that differ, then scores. Runs that differ in their seed alone are one column,
    with mean and deviation; * marks the best mean."""
    with reported("compare"):
        if not ranks.first():
            return
        require_extras()
        drawn = None if picture is None else check_new("picture", picture, (".png",))
        written = None if json is None else check_new("json", json)

        from rich.console import Console

        from pycse.training import compare as found

        groups = found.grouped(runs)
        Console(markup=False, highlight=False).print(found.table(groups))
        if drawn is not None:
            with new_file("picture", drawn) as file:
                found.plot(groups, file)
        if written is not None:
            with new_file("json", written) as file:
                file.write((as_json.dumps(found.as_dict(groups), indent=2) + "\n").encode())
