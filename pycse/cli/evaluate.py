"""`pycse eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from pycse.cli.app import app
from pycse.cli.loading import Attention, Device, Dtype, Pickle, Prompt, Trust, check, load
from pycse.cli.shared import is_local, quiet, reported
from pycse.training import ranks
from pycse.training.choices import EVAL_BATCH_SIZE
from pycse.training.errors import UserError, require_extras
from pycse.training.new_file import check_new, new_file
from pycse.training.settings import EVAL_HELP, Settings


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Hugging Face ids or folders of encoders; several are put side by side.")
    ],
    eval_file: Annotated[list[str] | None, typer.Option(help=EVAL_HELP, metavar="FILE")] = None,
    senteval: Annotated[
        str | None,
        typer.Option(
            help="SentEval's data/downstream folder: STS12 to STS16, STS-B and SICK-R, beside published scores.",
            metavar="FOLDER",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="--senteval: also the scores of each subset.")] = False,
    no_lee: Annotated[bool, typer.Option("--no-lee", help="Leave the Lee documents out.")] = False,
    prompt: Prompt = None,
    query_prompt: Annotated[str | None, typer.Option(help="Put before the first text of each pair.")] = None,
    document_prompt: Annotated[str | None, typer.Option(help="Put before the second text of each pair.")] = None,
    layers: Annotated[str, typer.Option(help="Layers to keep, from 0, as in 0,2,4.")] = "all",
    batch_size: Annotated[int, typer.Option(help="Texts embedded at a time.")] = EVAL_BATCH_SIZE,
    device: Device = "auto",
    dtype: Dtype = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    json: Annotated[str | None, typer.Option(help="New file to write the scores to as well.")] = None,
) -> None:
    """Print Spearman, alignment and uniformity on the Lee documents, every --eval-file and SentEval's STS tasks."""
    with reported("eval"):
        if not ranks.first():  # it is the work of one
            return
        settings = Settings(
            device=device,
            prompt=prompt,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        settings.check()
        check(dtype, batch_size)
        if full and senteval is None:
            raise UserError("--full belongs to --senteval; leave it out or give --senteval FOLDER")
        for model in models:
            if models.count(model) > 1:
                raise UserError(f"{model} is given {models.count(model)} times; give each encoder once")
        path = None if json is None else check_new("json", json)
        require_extras()
        local = [is_local(model) for model in models]
        quiet(all(local))

        from rich.console import Console

        from pycse.training import report
        from pycse.training.encoder import keep_layers, parse_layers
        from pycse.training.eval_report import evaluated, parts_table, plane_table, senteval_table
        from pycse.training.eval_sets import evaluation_sets
        from pycse.training.senteval import differences, senteval_sets

        keep = parse_layers(layers)
        tasks = senteval_sets(senteval) if senteval is not None else []
        sets = [] if no_lee and tasks and not eval_file else evaluation_sets(tuple(eval_file or ()), not no_lee)
        found = []
        for model in models:
            encoder = load(model, settings, dtype)
            if keep is not None:
                keep_layers(encoder, keep)
            found.append(evaluated(model, encoder, sets, tasks, batch_size=batch_size, prompts=settings.prompts))
        if path is not None:
            each = [one.as_dict() for one in found]
            with new_file("json", path) as file:
                file.write(report.json_text(each if len(each) > 1 else each[0]).encode())
        console = Console(markup=False, highlight=False)
        if sets:
            columns = {one.model: one.scores for one in found} if len(found) > 1 else {"score": found[0].scores}
            title = "Evaluation" if len(found) > 1 else f"Evaluation of {models[0]}"
            console.print(report.scores_table(columns, title, change=False))
        for one in sets:
            if one.skipped:
                console.print(f"{one.name}: {one.skipped:,} pairs without a score are left out")
        if tasks:
            console.print(senteval_table(found))
            if "STS-B" in found[0].senteval:
                console.print(plane_table(found))
            if full:
                console.print(parts_table(found))
            for difference in differences(tasks):
                console.print(f"{difference}: no comparison with published scores", style="bold red")
