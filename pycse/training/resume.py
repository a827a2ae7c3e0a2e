"""A run that is stopped and goes on: its folder, and what it has to find unchanged."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pycse.training import ranks, signals
from pycse.training.data import Text
from pycse.training.errors import UserError
from pycse.training.eval_sets import ScoredPairs
from pycse.training.files import is_stream
from pycse.training.folder import LAST_GOOD, REFUSED, Folder, claim, claim_again, forget, state_of
from pycse.training.options import flag
from pycse.training.settings import FIELDS, Settings
from pycse.training.signals import Interrupted

PACKAGES = ("pycse-kernels", "torch", "sentence-transformers", "transformers")


@contextmanager
def run_folder(settings: Settings, out: Path, text: Text, sets: list[ScoredPairs]) -> Iterator[Folder]:
    """The run's folder: rank 0 claims it, where all have checked that it may, or claims it again for --resume.

    All ranks have rank 0's name of it: of the default one the date is a part. A run that ends before it has a
    checkpoint leaves no folder, but for a model.
    """
    with ExitStack() as stack:
        with ranks.together():
            folder = None
            if ranks.first():
                if settings.resume is not None:
                    folder = stack.enter_context(claim_again(out))
                else:
                    folder = stack.enter_context(
                        claim(
                            out,
                            settings.out is not None,
                            settings.as_toml(),
                            description(settings, text, sets),
                            text.save if settings.train_file and is_stream(settings.train_file) else None,
                        )
                    )
        found = Path(ranks.of_first(str(folder.path) if folder else None))
        try:
            with signals.noted():
                yield folder or Folder(found, {})
        except BaseException as error:
            has_more = any((found / name).exists() for name in ("checkpoints", "model", LAST_GOOD, REFUSED))
            if isinstance(error, Interrupted) and not error.words and has_more:
                error.words = f"go on with: pycse {command_of(settings)} --resume {found}"
            if ranks.first() and not has_more and settings.resume is None:
                stack.callback(forget, found)
            raise
        if folder is not None:
            folder.done()
        if number := signals.caught():
            raise Interrupted(number, f"the run had ended; all of it is in {found}")


def description(settings: Settings, text: Text, sets: list[ScoredPairs]) -> dict[str, Any]:
    """What a run that goes on has to find unchanged, and what it had better: run.json."""
    return {
        "command": command_of(settings),
        "ended": False,
        "settings": settings.to_repeat(),
        "text": text.fingerprint(),
        "evaluations": {one.name: fingerprint(one) for one in sets},
        "processes": ranks.size(),
        "here": here(),
    }


def here() -> dict[str, Any]:
    """What bits depend on beside settings and data."""
    import torch

    return {
        **{name: installed(name) for name in ("pycse-kernels", "torch", "sentence-transformers", "transformers")},
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }


def check_same_run(settings: Settings) -> None:
    """Raise UserError where a run that goes on has other settings or processes, before anything is read."""
    if settings.resume is None:
        return
    path = Path(settings.resume)
    was = state_of(path)
    if was.get("command") != command_of(settings):
        raise UserError(f"--resume {path} is a run of pycse {was.get('command')}; go on with that command")
    before, now = was.get("settings", {}), settings.to_repeat()
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            known = FIELDS[name].flag or flag(name)
            raise UserError(
                f"--resume {path}: that run has --{known} {in_words(before.get(name))}, not "
                f"{in_words(now.get(name))}; leave it out"
            )
    if was.get("processes") != ranks.size():
        raise UserError(f"--resume {path} had {was.get('processes')} processes, not {ranks.size()}; start as many")


def check_same_data(settings: Settings, text: Text, sets: list[ScoredPairs], console: Any) -> None:
    """Raise UserError where a run that goes on has other data; say what else is new, which changes last bits."""
    if settings.resume is None:
        return
    path = Path(settings.resume)
    was, now = state_of(path), description(settings, text, sets)
    changed = [f"the text {text.source}"] if was.get("text") != now["text"] else []
    known = was.get("evaluations", {})
    changed += [f"the evaluation set {name}" for name, key in now["evaluations"].items() if known.get(name) != key]
    if changed:
        raise UserError(f"--resume {path}: {changed[0]} has changed since that run began; start a new run")
    new = [name for name, value in now["here"].items() if was.get("here", {}).get(name) != value]
    if new and ranks.first():
        console.print(f"not the same as before: {', '.join(new)}. The run goes on, and may differ in the last bits")


def command_of(settings: Settings) -> str:
    return "sparsify" if settings.prunes else "train"


def fingerprint(pairs: ScoredPairs) -> str:
    """sha256 of an evaluation set."""
    return hashlib.sha256(json.dumps(asdict(pairs)).encode("utf-8", "surrogatepass")).hexdigest()


def in_words(value: Any) -> str:
    return "the default" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def installed(package: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
