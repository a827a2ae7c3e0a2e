"""The folder that a run writes to."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from pycse.training.errors import UserError


def output_folder(out: str | None, recipe: str) -> Path:
    """The folder to write to, which is new or empty; it is not made here. UserError if it has content.

    Without `out`: runs/RECIPE-DATE-TIME, with a number behind it where that exists.
    """
    if out is None:
        name = Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        path, count = name, 1
        while path.exists():
            count += 1
            path = name.with_name(f"{name.name}-{count}")
    else:
        path = Path(out)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; give a new or empty folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {path} has content, which is not overwritten; give a new or empty folder")
    check_writable("out", path)
    return path


def check_writable(name: str, path: Path) -> None:
    """Raise UserError unless a folder is writable, or can be made; it is not made here."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--{name} {path}: cannot write in {nearest}; give another folder")
