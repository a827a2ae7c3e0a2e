"""What the commands that read an encoder and do not train it have in common: its options, and how it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pycse.training.choices import DTYPES
from pycse.training.errors import UserError
from pycse.training.settings import DEVICE_HELP, PICKLE_HELP, TRUST_HELP, Settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
Dtype = Annotated[
    str | None, typer.Option(help=f"Of the weights, one of {', '.join(DTYPES)}. Default: as they are stored.")
]
Attention = Annotated[str | None, typer.Option(help="Of transformers, as in eager or sdpa.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help=PICKLE_HELP)]
Prompt = Annotated[str | None, typer.Option(help="Put before every text.")]


def check(dtype: str | None, batch_size: int) -> None:
    """Raise UserError for options that Settings has not, or by another name."""
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype}: unknown; use one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")


def load(model: str, settings: Settings, dtype: str | None) -> SentenceTransformer:
    """The encoder that a command was given."""
    from pycse.training.encoder import load_encoder, loading_options
    from pycse.training.names import resolve_model

    return load_encoder(resolve_model(model)[0], settings.device, **loading_options(settings) | {"dtype": dtype})
