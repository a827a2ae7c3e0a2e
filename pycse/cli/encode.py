"""`pycse encode`."""

from __future__ import annotations

from typing import Annotated

import typer

from pycse.cli.app import app
from pycse.cli.loading import Attention, Device, Dtype, Pickle, Prompt, Trust, check, load
from pycse.cli.shared import is_local, quiet, reported
from pycse.training import ranks
from pycse.training.choices import EVAL_BATCH_SIZE
from pycse.training.errors import UserError, require_extras
from pycse.training.new_file import check_new
from pycse.training.settings import Settings


@app.command()
def encode(
    model: Annotated[str, typer.Argument(help="Hugging Face id or folder of the encoder.")],
    file: Annotated[str, typer.Argument(help="One text a line; a pipe will do.", metavar="FILE")],
    out: Annotated[str, typer.Option(help="New .npy file: float32, row i is line i.", metavar="FILE")],
    prompt: Prompt = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale embeddings to length 1.")] = False,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep the first features alone.", metavar="D")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts embedded at a time.")] = EVAL_BATCH_SIZE,
    device: Device = "auto",
    dtype: Dtype = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Write the embedding of every line of a file. Memory does not grow with the file."""
    with reported("encode"):
        if not ranks.first():  # it is the work of one
            return
        settings = Settings(
            device=device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        settings.check()
        check(dtype, batch_size)
        if truncate_dim is not None and truncate_dim < 1:
            raise UserError(f"--truncate-dim is {truncate_dim}; it must be at least 1")

        path = check_new("out", out, (".npy",))
        require_extras()
        quiet(is_local(model))

        from rich.console import Console

        from pycse.training.embed import encode_file
        from pycse.training.files import is_stream, opened

        if not is_stream(file):  # else it can be read only once
            opened(file).close()
        console = Console(markup=False, highlight=False)
        encoder = load(model, settings, dtype)
        with console.status("embedding") as status:
            rows, width = encode_file(
                encoder,
                file,
                path,
                batch_size=batch_size,
                prompt=prompt,
                normalize=normalize,
                truncate_dim=truncate_dim,
                said=lambda rows: status.update(f"{rows:,} lines embedded"),
            )
        console.print(f"{rows:,} lines, {width} features each, written to {path}")
