"""What commands share: how they fail, and how libraries are kept quiet."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from pycse.training import ranks, signals
from pycse.training.errors import Failed, UserError
from pycse.training.settings import Settings


@contextmanager
def reported(command: str) -> Iterator[None]:
    """Turn what the user can put right into one line on stderr and exit code 2. The only place that does.

    Of several processes one says what went wrong, and with which rank, and all exit with its code.
    """

    def line(error: UserError, where: str = "") -> None:
        typer.echo(f"pycse {command}: error: {where}{' '.join(str(error).split())}", err=True)

    try:
        with signals.received(), ranks.one_voice():
            yield
    except signals.Interrupted as error:
        if ranks.first():
            typer.echo(f"pycse {command}: {signals.name(error.number)}: {error.words or 'stopped'}", err=True)
        raise typer.Exit(128 + error.number) from None
    except Failed as error:
        if ranks.first():
            typer.echo(f"pycse {command}: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    except ranks.Agreed as error:
        if ranks.first():
            line(error)
        raise typer.Exit(2) from None
    except UserError as error:
        known = error
        if ranks.size() == 1:
            line(error)
            raise typer.Exit(2) from None
        raise typer.Exit(ranks.failed(2, lambda where: line(known, where))) from None
    except ranks.Elsewhere:
        raise typer.Exit(1) from None
    except Exception:
        if ranks.size() == 1:
            raise
        text = traceback.format_exc()
        raise typer.Exit(
            ranks.failed(1, lambda where: typer.echo(f"pycse {command}: {where}{text}", err=True))
        ) from None


def quiet(local: bool) -> None:
    """Keep the libraries silent and, for a model on this disk, off the network. Before their first import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if local:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets.utils.logging import disable_progress_bar
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bar()
    if not sys.stderr.isatty():  # downloads alone are worth one
        disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for message in (".*pin_memory.*", ".*OMP_NUM_THREADS.*", ".*broadcast_buffers.*"):
        warnings.filterwarnings("ignore", message=message)


def finish(write: Callable[[], None]) -> None:
    """The end of a run: rank 0 writes what all have done."""
    with ranks.together():
        if ranks.first():
            write()
    ranks.leave()


def already_ended(settings: Settings, console: Any) -> bool:
    """Whether --resume names a run that has nothing left to do; says so."""
    from pycse.training.folder import state_of

    if settings.resume is None or not state_of(Path(settings.resume)).get("ended"):
        return False
    console.print(f"the run in {settings.resume} has ended; there is nothing left to do")
    return True


def is_local(model: str | None, teachers: tuple[str, ...] = ()) -> bool:
    """Whether the model and the teachers lie on this disk; UserError for a path that holds none."""
    from pycse.training.names import resolve_model, resolve_teachers

    return (model is None or resolve_model(model)[1]) and all(local for _, local in resolve_teachers(teachers))
