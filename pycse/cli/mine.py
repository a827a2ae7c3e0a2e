"""`pycse mine`."""

from __future__ import annotations

from typing import Annotated

import typer

from pycse.cli.app import app
from pycse.cli.loading import Attention, Device, Dtype, Pickle, Prompt, Trust, check, load
from pycse.cli.shared import is_local, quiet, reported
from pycse.training import ranks
from pycse.training.choices import BUNDLED, EVAL_BATCH_SIZE, FORMATS
from pycse.training.errors import UserError, require_extras
from pycse.training.new_file import check_new
from pycse.training.settings import Settings


@app.command()
def mine(
    file: Annotated[str, typer.Argument(help="Sentences or pairs, as --train-file of pycse train.", metavar="FILE")],
    out: Annotated[str, typer.Option(help="New .tsv, .csv or .jsonl file, for --train-file.", metavar="FILE")],
    model: Annotated[str, typer.Option(help="Hugging Face id or folder of the encoder that searches.")] = BUNDLED,
    negatives: Annotated[int, typer.Option(help="Negatives a row; rows with fewer are left out.")] = 1,
    skip: Annotated[int, typer.Option(help="Nearest texts that are left out: often positives that nobody marked.")] = 0,
    depth: Annotated[
        int | None, typer.Option(help="Nearest texts that are looked at. Default: as many as are needed.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="A negative's cosine is at least so far below the positive's.")
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="The same as a share of the positive's cosine, as in 0.05.")
    ] = None,
    least: Annotated[float | None, typer.Option(help="Least cosine of a negative.")] = None,
    most: Annotated[float | None, typer.Option(help="Largest cosine of a negative.")] = None,
    sampling: Annotated[str, typer.Option(help="top: the nearest of what is left; random: any of it.")] = "top",
    corpus: Annotated[
        str | None, typer.Option(help="Texts to take negatives from, one a line, beside the positives.", metavar="FILE")
    ] = None,
    format: Annotated[str | None, typer.Option(help=f"How FILE is written, one of {', '.join(FORMATS)}.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of FILE, by name or number from 1: anchor, positive.", metavar="A,B")
    ] = None,
    header: Annotated[bool, typer.Option("--header", help="The first line of FILE names its columns.")] = False,
    no_header: Annotated[bool, typer.Option("--no-header", help="The first line of FILE is text.")] = False,
    prompt: Prompt = None,
    query_prompt: Annotated[str | None, typer.Option(help="Put before anchors.")] = None,
    document_prompt: Annotated[str | None, typer.Option(help="Put before positives and candidates.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of --sampling random.")] = 42,
    batch_size: Annotated[int, typer.Option(help="Texts embedded at a time.")] = EVAL_BATCH_SIZE,
    device: Device = "auto",
    dtype: Dtype = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Find hard negatives for sentences or pairs: the texts that an encoder puts near an anchor.

    Sentences become pairs with themselves, as SimCSE trains on them. Negatives are taken from the positives of all
    rows, and from --corpus.
    """
    with reported("mine"):
        if not ranks.first():  # it is the work of one
            return
        settings = Settings(
            train_file=file,
            format=format,
            columns=columns,
            header=header,
            no_header=no_header,
            prompt=prompt,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
            seed=seed,
            device=device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        settings.check()
        check(dtype, batch_size)

        from pycse.training.mine import SUFFIXES, Mining, check_texts, write_rows
        from pycse.training.mine import mine as found_by

        mining = Mining(negatives, skip, depth, margin, relative_margin, least, most, sampling)
        mining.check()
        path = check_new("out", out, SUFFIXES)
        require_extras()
        quiet(is_local(model))

        from rich.console import Console

        from pycse.training.data import read_train_file
        from pycse.training.report import text_table

        text = read_train_file(file, format, columns, settings.heading)
        if len(text.columns) > 2:
            raise UserError(f"{file} has negatives already; give --columns of anchor and positive")
        others = None
        if corpus is not None:
            candidates = read_train_file(corpus)
            if len(candidates.columns) != 1:
                raise UserError(f"--corpus {corpus} has {len(candidates.columns)} columns; give one text a line")
            others = [row[0] for row in candidates.rows]
        check_texts(text, others, path)
        console = Console(markup=False, highlight=False)
        console.print(text_table(text))
        rows = found_by(
            load(model, settings, dtype),
            text,
            mining,
            corpus=others,
            batch_size=batch_size,
            prompts=settings.prompts,
            seed=seed,
        )
        write_rows(rows, path)
        few = len(text.rows) - len(rows)
        console.print(
            f"{len(rows):,} rows with {negatives} hard negative{'s' if negatives > 1 else ''} each written to {path}"
            + (f"; {few:,} rows had too few texts near them" if few else "")
        )
