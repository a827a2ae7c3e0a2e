"""`pycse info`."""

from __future__ import annotations

import typer

from pycse.cli.app import app


@app.command()
def info() -> None:
    """List the backends, usable or why not, with versions."""
    from pycse.report import info

    typer.echo(str(info()))
