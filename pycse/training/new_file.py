"""A file that a command writes: new, and there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pycse.training.errors import UserError
from pycse.training.files import user_path
from pycse.training.folder import umask


def check_new(name: str, path: str | Path, suffixes: tuple[str, ...] = ()) -> Path:
    """The path of --name; UserError where it exists, has another ending, or nothing can be written there."""
    shown, path = path, user_path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"--{name} {shown}: give a name that ends with {' or '.join(suffixes)}")
    if os.path.lexists(path):
        raise UserError(f"--{name} {shown} exists and is not overwritten; give a new file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--{name} {shown}: there is no folder {path.parent}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--{name} {shown}: cannot write in {path.parent}; give another folder")
    return path


@contextmanager
def new_file(name: str, path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name when all is written; UserError where it cannot be, or the name is taken by
    then."""
    try:
        number, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name[:50]}-")
    except OSError as error:
        raise UserError(f"--{name} {path}: {error.strerror}; give another file") from None
    try:
        with open(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # the name, unless somebody has it
        os.replace(temporary, path)
    except FileExistsError:
        raise UserError(f"--{name} {path} exists by now and is not overwritten; give a new file") from None
    except OSError as error:
        raise UserError(f"--{name} {path}: {error.strerror or error}; give another file") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
