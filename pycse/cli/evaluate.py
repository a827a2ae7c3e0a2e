"""`pycse eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pycse.cli.app import app
from pycse.cli.shared import is_local, quiet, reported
from pycse.training import ranks
from pycse.training.errors import UserError, require_extras
from pycse.training.settings import DEVICE_HELP, EVAL_HELP, Settings


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hugging Face id or folder of the encoder.")],
    eval_file: Annotated[list[str] | None, typer.Option(help=EVAL_HELP, metavar="FILE")] = None,
    layers: Annotated[str, typer.Option(help="Layers to keep, from 0, as in 0,2,4.")] = "all",
    batch_size: Annotated[int, typer.Option(help="Texts embedded at a time.")] = 64,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    json: Annotated[str | None, typer.Option(help="New file to write the scores to as well.")] = None,
) -> None:
    """Print Spearman on the Lee documents and on every --eval-file, alignment and uniformity."""
    with reported("eval"):
        if not ranks.first():  # it is the work of one
            return
        Settings(device=device, batch_size=batch_size).check()
        if json is not None and Path(json).exists():
            raise UserError(f"--json {json} exists and is not overwritten; give a new file")
        if json is not None and not Path(json).absolute().parent.is_dir():
            raise UserError(f"--json {json}: there is no folder {Path(json).parent}; make it first")
        require_extras()
        quiet(is_local(model))

        from rich.console import Console

        from pycse.training import report
        from pycse.training.encoder import keep_layers, load_encoder, parse_layers, resolve_model
        from pycse.training.evaluate import evaluate as scores_of
        from pycse.training.evaluate import evaluation_sets

        keep = parse_layers(layers)
        sets = evaluation_sets(tuple(eval_file or ()))
        encoder = load_encoder(resolve_model(model)[0], device)
        if keep is not None:
            keep_layers(encoder, keep)
        scores = scores_of(encoder, sets, batch_size)
        Console(markup=False, highlight=False).print(
            report.scores_table({"score": scores}, title=f"Evaluation of {model}")
        )
        if json is not None:
            report.write_json({"model": model, "scores": scores}, Path(json))
