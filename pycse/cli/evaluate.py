"""`pycse eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pycse.cli.app import app
from pycse.cli.shared import is_local, quiet, reported
from pycse.training import ranks
from pycse.training.choices import DTYPES
from pycse.training.errors import UserError, require_extras
from pycse.training.settings import DEVICE_HELP, EVAL_HELP, PICKLE_HELP, TRUST_HELP, Settings


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hugging Face id or folder of the encoder.")],
    eval_file: Annotated[list[str] | None, typer.Option(help=EVAL_HELP, metavar="FILE")] = None,
    layers: Annotated[str, typer.Option(help="Layers to keep, from 0, as in 0,2,4.")] = "all",
    batch_size: Annotated[int, typer.Option(help="Texts embedded at a time.")] = 64,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the weights, one of {', '.join(DTYPES)}. Default: as they are stored.")
    ] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="Of transformers, as in eager or sdpa.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=PICKLE_HELP)] = False,
    json: Annotated[str | None, typer.Option(help="New file to write the scores to as well.")] = None,
) -> None:
    """Print Spearman on the Lee documents and on every --eval-file, alignment and uniformity."""
    with reported("eval"):
        if not ranks.first():  # it is the work of one
            return
        settings = Settings(
            device=device,
            batch_size=batch_size,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        settings.check()
        if dtype not in (None, *DTYPES):
            raise UserError(f"--dtype {dtype}: unknown; use one of {', '.join(DTYPES)}")
        if json is not None and Path(json).exists():
            raise UserError(f"--json {json} exists and is not overwritten; give a new file")
        if json is not None and not Path(json).absolute().parent.is_dir():
            raise UserError(f"--json {json}: there is no folder {Path(json).parent}; make it first")
        require_extras()
        quiet(is_local(model))

        from rich.console import Console

        from pycse.training import report
        from pycse.training.encoder import keep_layers, load_encoder, loading_options, parse_layers
        from pycse.training.eval_sets import evaluation_sets
        from pycse.training.evaluate import check_ranking
        from pycse.training.evaluate import evaluate as scores_of
        from pycse.training.names import resolve_model

        keep = parse_layers(layers)
        sets = evaluation_sets(tuple(eval_file or ()))
        encoder = load_encoder(resolve_model(model)[0], device, **loading_options(settings) | {"dtype": dtype})
        if keep is not None:
            keep_layers(encoder, keep)
        scores = scores_of(encoder, sets, batch_size)
        check_ranking(model, scores)
        Console(markup=False, highlight=False).print(
            report.scores_table({"score": scores}, title=f"Evaluation of {model}")
        )
        if json is not None:
            report.write_json({"model": model, "scores": scores}, Path(json))
