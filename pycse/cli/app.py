"""The command itself: its commands register here, and it starts."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from pycse.training import ranks

app = typer.Typer(
    help="Fused contrastive losses for sentence embeddings: train and evaluate encoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as of

        typer.echo(of("pycse-kernels"))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=version, is_eager=True)
    ] = False,
) -> None:
    """What belongs to no command."""


def main() -> None:
    """Entry point of the `pycse` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets a poorer curve, not a traceback
    if ranks.first():
        app(prog_name="pycse")
        return
    # Help, and what is wrong with the command line, come from rank 0 alone.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            sys.exit(app(prog_name="pycse", standalone_mode=False))
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            sys.exit(error.exit_code)
