"""The folder that a run writes to: one run's alone, and nothing half-written has a final name.

OUT/run.toml        the settings, for --config
OUT/run.json        what --resume compares, and whether the run has ended
OUT/text.parquet    the text, where it came through a pipe
OUT/checkpoints/    checkpoints.py
OUT/model/ ...      results, each written under another name and renamed
OUT/.lock           held while a run writes here; the system lets go of it when a process ends, however it ends
OUT/.work/          files of a run that nobody needs after it
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pycse.training.errors import UserError

REFUSED, LAST_GOOD = "model-refused", "last-good-model"
STATE, CONFIG, TEXT, WORK, LOCK, STAGE = "run.json", "run.toml", "text.parquet", ".work", ".lock", ".new-"
OLD = ".old-"  # what a name had before, until it has the new


class Folder:
    """A run's folder, claimed by :func:`claim` or :func:`claim_again`.

    Fields:
        path: the folder.
        work: for files that end with the run.
        state: what run.json holds, while the run goes on.
    """

    def __init__(self, path: Path, state: dict[str, Any]):
        self.path, self.state = path, state

    @property
    def work(self) -> Path:
        return self.path / WORK

    def done(self) -> None:
        """The run has ended: nobody need hold the folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.say(ended=True)
        (self.path / TEXT).unlink(missing_ok=True)
        (self.path / LOCK).unlink(missing_ok=True)

    def say(self, **changes: Any) -> None:
        """Change run.json."""
        self.state |= changes
        write_text(self.path / STATE, json.dumps(self.state, indent=2) + "\n")


@contextmanager
def claim(
    out: Path, given: bool, config: str, state: dict[str, Any], keep: Callable[[Path], None] | None = None
) -> Iterator[Folder]:
    """Make the folder and hold it.

    Args:
        out: its name; where it was not ``given``, a number is added if another run has it by now.
        config: run.toml, written first: a folder with a run.json can be resumed.
        state: run.json.
        keep: writes text.parquet, before run.json too.

    Raises:
        UserError: the folder cannot be made; or another run has claimed it since its name was checked.
    """
    path = out
    with of_disk(f"--out {out}"):
        if given:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            count = 1
            while True:
                with suppress(FileExistsError):
                    path.mkdir()
                    break
                count += 1
                path = out.with_name(f"{out.name}-{count}")
    with held(path):
        if has_content(path):
            raise UserError(f"--out {out} has content by now, which is not overwritten; give a new or empty folder")
        folder = Folder(path, {})
        clean(path)
        with of_disk(str(path)):
            write_text(path / CONFIG, config)
            if keep is not None:
                keep(path / f"{STAGE}{TEXT}")
                (path / f"{STAGE}{TEXT}").replace(path / TEXT)
            folder.say(**state)
        with working(folder):
            yield folder


@contextmanager
def claim_again(path: Path) -> Iterator[Folder]:
    """Hold the folder of a run that goes on."""
    with held(path):
        folder = Folder(path, state_of(path))
        clean(path)
        with working(folder):
            yield folder


@contextmanager
def held(path: Path) -> Iterator[None]:
    """The folder's lock. UserError where another process has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run writes to {path}; wait for its end, or give another folder") from None
    except OSError as error:
        raise UserError(f"cannot write in {path} ({error.strerror}); give another folder") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def working(folder: Folder) -> Iterator[None]:
    """Make the folder of working files, and remove it."""
    with of_disk(str(folder.path)):
        folder.work.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder.work, ignore_errors=True)


def forget(path: Path) -> None:
    """Remove the folder of a run that has left nothing."""
    shutil.rmtree(path / WORK, ignore_errors=True)
    for name in (STATE, CONFIG, TEXT, LOCK):
        (path / name).unlink(missing_ok=True)
    for folder in (path, path.parent if path.parent.name == "runs" else path):
        with suppress(OSError):  # something else is in it
            folder.rmdir()


def clean(path: Path) -> None:
    """Remove what a killed run has left half-written, and its working files."""
    for old in [*path.glob(f"{OLD}*"), *(path / "checkpoints").glob(f"{OLD}*")]:
        for kept in old.iterdir():
            if not (old.parent / kept.name).exists():
                kept.rename(old.parent / kept.name)
        shutil.rmtree(old, ignore_errors=True)
    for entry in [*path.iterdir(), *(path / "checkpoints").glob(f"{STAGE}*")]:
        if entry.name == WORK or entry.name.startswith(STAGE):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def has_content(path: Path) -> bool:
    """Whether a folder holds more than what a run leaves that was killed before it had begun."""
    return any(
        entry.name not in (LOCK, CONFIG, TEXT, WORK) and not entry.name.startswith(STAGE) for entry in path.iterdir()
    ) or ((path / CONFIG).exists() and not (path / LOCK).exists())


def state_of(path: Path) -> dict[str, Any]:
    """What run.json of a run's folder holds; UserError where there is no such run."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"has no {STATE}" if path.is_dir() else "is no folder"
        raise UserError(f"--resume {path} {what}; give the folder of a run that was stopped") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {path}: cannot read {STATE} ({error}); start the run anew") from error
    return state


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which takes its name, and its place, when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=target.parent))
    try:
        yield stage
        stage.chmod(0o777 & ~umask())
        rename(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def rename(stage: Path, target: Path) -> None:
    """Give a staged folder its name, after what it holds has reached the disk."""
    for path in [stage, *stage.rglob("*")]:
        sync(path)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=OLD, dir=target.parent))
        target.rename(old / target.name)
        stage.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        stage.rename(target)
    sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    stage = path.with_name(f"{STAGE}{path.name}")
    try:
        stage.write_text(text, encoding="utf-8")
        sync(stage)
        stage.replace(path)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the system can say so."""
    with suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def umask() -> int:
    """Of this process; mkdtemp goes by its own."""
    now = os.umask(0)
    os.umask(now)
    return now


@contextmanager
def of_disk(what: str) -> Iterator[None]:
    """A disk that is full, read-only or gone is the user's to put right."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) not in what else ""
        raise UserError(f"cannot write {what}: {error.strerror or error}{where}") from error


def save_or_rescue(save: Callable[[Path], None], target: Path) -> None:
    """Save a model as the folder ``target``; where that cannot be, somewhere else, which the error names.

    Raises:
        UserError: it was saved elsewhere, or nowhere; or what was saved is not what it should be.
    """
    try:
        with staged(target) as stage:
            try:
                save(stage)
            except UserError as error:  # written, and not equal to what was to be saved
                kept = target.with_name(REFUSED)
                shutil.rmtree(kept, ignore_errors=True)
                stage.rename(kept)
                raise UserError(str(error).replace(str(stage), str(kept))) from error
        return
    except UserError:
        raise
    except Exception as error:
        if not is_of_disk(error):
            raise
        problem = f"cannot write {target} ({getattr(error, 'strerror', None) or error})"
    try:
        rescue = Path(tempfile.mkdtemp(prefix="pycse-model-"))
        save(rescue)
    except Exception as error:
        raise UserError(f"{problem}; nor could the weights be written elsewhere ({error}): they are lost") from error
    raise UserError(f"{problem}; the trained weights are in {rescue}")


def is_of_disk(error: Exception) -> bool:
    """Whether a library's own error speaks of the disk: safetensors and torch wrap the system's."""
    signs = ("os error", "No space left", "I/O error", "iostream error", "file write failed", "inline_container")
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) or any(sign in str(found) for sign in signs):
            return True
        found = found.__cause__ or found.__context__
    return False


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
        path = Path(os.path.expanduser(out))
    with of_path("out", path):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; give a new or empty folder")
        if path.is_symlink() and not path.exists():
            raise UserError(f"--out {path} is a link to nothing; give a new or empty folder")
        if path.is_dir() and has_content(path):
            hint = "give a new or empty folder"
            with suppress(UserError):
                state = state_of(path)
                if not state.get("ended"):
                    hint = f"go on with that run by pycse {state.get('command', 'train')} --resume {path}, or {hint}"
            raise UserError(f"--out {path} has content, which is not overwritten; {hint}")
    check_writable("out", path)
    return path


def check_writable(name: str, path: Path) -> None:
    """Raise UserError unless a folder is writable, or can be made; it is not made here."""
    with of_path(name, path):
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--{name} {path}: cannot write in {nearest}; give another folder")


@contextmanager
def of_path(name: str, path: Path) -> Iterator[None]:
    """A path that cannot even be asked about (too long, no permission to search) is the user's to put right."""
    try:
        yield
    except OSError as error:
        shown = str(path) if len(str(path)) < 80 else f"{str(path)[:60]}…"
        raise UserError(f"--{name} {shown}: {error.strerror}; give another folder") from error
