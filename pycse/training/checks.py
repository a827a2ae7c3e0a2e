"""What settings may be, and which go together: checked before any work, one line for the first that does not.

Nothing heavy is imported here.
"""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pycse.choices import DIVERGENCES, SHUFFLES
from pycse.training.choices import (
    AS_LOADED,
    DEVICES,
    DTYPES,
    FORMATS,
    GRANULARITIES,
    HEADS,
    KEEP,
    MEANS,
    POOLINGS,
    POSITIVES,
    REPORTERS,
    SCHEDULES,
    SCOPES,
    n_of_m,
)
from pycse.training.errors import UserError
from pycse.training.options import flag
from pycse.training.recipes import PRUNING, RECIPES, recipes_with

if TYPE_CHECKING:
    from pycse.training.settings import Settings

LEAST = {"batch_size": 2, "steps": 1, "max_length": 3, "eval_steps": 1, "eval_batch_size": 1, "seed": 0}


def check(settings: Settings) -> None:
    """Raise UserError for the first setting that is out of its range or does not go with another."""
    if settings.recipe not in RECIPES:
        raise UserError(f"--recipe {settings.recipe}: unknown; use one of {', '.join(RECIPES)}")
    for name in dict.fromkeys(name for recipe in RECIPES.values() for name in recipe.own):
        if getattr(settings, name) is not None and name not in RECIPES[settings.recipe].own:
            others = " or ".join(recipes_with(name))
            raise UserError(
                f"--{flag(name)} does not belong to --recipe {settings.recipe}; leave it out or use --recipe {others}"
            )
    check_static(settings)
    check_teachers(settings)
    check_pruning(settings)
    check_text(settings)
    check_model(settings)
    if settings.steps is not None and settings.epochs is not None:
        raise UserError("--steps and --epochs exclude each other; give one of them")
    if settings.positives not in (None, *POSITIVES):
        raise UserError(f"--positives {settings.positives}: unknown; use one of {', '.join(POSITIVES)}")
    for name, allowed in (("device", DEVICES), ("shuffle", SHUFFLES), ("divergence", DIVERGENCES)):
        value = getattr(settings, name)
        if value not in (None, *allowed):
            raise UserError(f"--{name} {value}: unknown; use one of {', '.join(allowed)}")
    for name in ("temperature", "epochs", "lr", "student_temperature", "teacher_temperature", "group_temperature"):
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{flag(name)} is {value:g}; it must be a finite number above 0")
    for name in ("m", "hard_negative_weight", "distill_weight"):
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{flag(name)} is {value:g}; it must be a finite number")
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{flag(name)} is {value}; it must be at least {least}")
    for name, least in (("grad_accumulation", 1), ("cached", 1), ("patience", 1), ("save_steps", 1), ("workers", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{flag(name)} is {value}; it must be at least {least}")
    if settings.seed >= 2**32:
        raise UserError(f"--seed is {settings.seed}; it must be below 2**32")
    if not 0 <= settings.warmup < 1:
        raise UserError(f"--warmup is {settings.warmup:g}; it must be a share of the steps: at least 0, below 1")
    for name in ("weight_decay", "max_grad_norm"):
        value = getattr(settings, name)
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{flag(name)} is {value:g}; it must be a finite number, at least 0")
    check_course(settings)


def check_course(settings: Settings) -> None:
    """Raise UserError for settings of what is kept and how, which do not go together."""
    for name, allowed in (("keep", KEEP), ("schedule", SCHEDULES)):
        value = getattr(settings, name)
        if value not in allowed:
            raise UserError(f"--{name} {value}: unknown; use one of {', '.join(allowed)}")
    if settings.keep != "best":
        for name in ("best_by", "patience"):
            if getattr(settings, name) is not None:
                raise UserError(f"--{flag(name)} belongs to --keep best; leave it out or give that too")
    for name in settings.report_to:
        if name not in REPORTERS:
            raise UserError(f"--report-to {name}: unknown; use one of {', '.join(REPORTERS)}")
        if find_spec(name) is None:
            raise UserError(f"--report-to {name}: {name} is not installed; run: pip install {name}")
    if settings.cached is not None and settings.cached >= settings.batch_size:
        raise UserError(
            f"--cached is {settings.cached}, and a batch has {settings.batch_size} rows; give fewer, or leave it out"
        )
    if settings.resume is not None and settings.out is not None:
        raise UserError("--resume and --out exclude each other; a run goes on in its own folder")
    if settings.dry_run and settings.resume is not None:
        raise UserError("--dry-run and --resume exclude each other")
    if settings.static is not None:
        for name, usual in (
            ("dry_run", False),
            ("cached", None), ("grad_accumulation", 1), ("gradient_checkpointing", False), ("workers", 0),
            ("report_to", ()), ("max_grad_norm", 1.0), ("schedule", "linear"),
        ):  # fmt: skip
            if getattr(settings, name) != usual:
                raise UserError(f"--{flag(name)} does not go with --static; leave it out")


def check_static(settings: Settings) -> None:
    """Raise UserError for settings that do not go with a static table, or need one."""
    if settings.static is None:
        for name in ("init", "dims"):
            if getattr(settings, name) is not None:
                raise UserError(f"--{name} belongs to --static; leave it out or give --static WIDTH")
        return
    if settings.static < 1:
        raise UserError(f"--static is {settings.static}; it must be at least 1")
    settings.lengths  # noqa: B018 (raises)
    recipe = RECIPES[settings.recipe]
    if recipe.prunes:
        others = " or ".join(name for name, other in RECIPES.items() if not other.prunes)
        raise UserError(f"--recipe {settings.recipe} removes parameters of encoders, not of --static; use {others}")
    if recipe.teaches and not settings.teachers:
        raise UserError(f"--recipe {settings.recipe} with --static has no encoder to learn from; give --teacher")
    if settings.layers is not None:
        raise UserError("--layers does not go with --static: a table has no layers; leave it out")
    if settings.model is not None and settings.init is not None:
        raise UserError("--model (its tokenizer alone) and --init (its embeddings too) exclude each other")
    if settings.positives == "dropout":
        raise UserError(
            "--positives dropout does not go with --static: a table has no dropout, so both views of a sentence "
            "are equal; use next, or pairs in --train-file"
        )


def check_teachers(settings: Settings) -> None:
    """Raise UserError where the teachers do not go with the recipe, or there is nobody to learn from."""
    if not RECIPES[settings.recipe].teaches:
        teaching = " or ".join(name for name, recipe in RECIPES.items() if recipe.teaches)
        for name, given in (("teacher", settings.teachers), ("cache-teachers", settings.cache_teachers)):
            if given:
                raise UserError(
                    f"--recipe {settings.recipe} takes no --{name}; leave it out or use --recipe {teaching}"
                )
    # What is left of a pruned encoder learns from the whole one.
    elif (
        not settings.prunes
        and settings.static is None
        and not settings.teachers
        and settings.model is not None
        and settings.uncut
    ):
        raise UserError(
            f"--recipe {settings.recipe}: the encoder is uncut and would be its own teacher; give --teacher, "
            f"or --layers to cut it, or --recipe focal"
        )
    for name in settings.teachers:
        if settings.teachers.count(name) > 1:
            raise UserError(f"--teacher {name} is given {settings.teachers.count(name)} times; give each teacher once")


def check_pruning(settings: Settings) -> None:
    """Raise UserError for settings of the removal of parameters that do not go together, or with the recipe."""
    if not (settings.prunes or RECIPES[settings.recipe].prunes):
        recipe = " or ".join(name for name, recipe in RECIPES.items() if recipe.prunes)
        for name in PRUNING:
            if getattr(settings, name) is not None:
                raise UserError(
                    f"--{flag(name)} does not belong to --recipe {settings.recipe}; "
                    f"leave it out or use --recipe {recipe}"
                )
        return
    for name, allowed in (("scope", SCOPES), ("means", MEANS)):
        value = getattr(settings, name)
        if value not in (None, *allowed):
            raise UserError(f"--{name} {value}: unknown; use one of {', '.join(allowed)}")
    kind = settings.granularity or PRUNING["granularity"]
    if kind not in GRANULARITIES and n_of_m(kind) is None:
        raise UserError(
            f"--granularity {kind}: unknown; use one of {', '.join(GRANULARITIES)}, or n:m with 1 <= n <= m as in 2:4"
        )
    if settings.sparsity is not None and not 0 <= settings.sparsity < 1:
        raise UserError(f"--sparsity is {settings.sparsity:g}; it must be a share: at least 0, below 1")
    if (numbers := n_of_m(kind)) is not None:
        n, m = numbers
        if settings.sparsity is not None and abs(settings.sparsity - (1 - n / m)) > 1e-6:
            raise UserError(
                f"--sparsity {settings.sparsity:g} contradicts --granularity {kind}, which removes {1 - n / m:g}; "
                f"leave it out"
            )
        if settings.scope == "global":
            raise UserError(f"--scope global contradicts --granularity {kind}, which has the same share everywhere")
    if settings.block is not None and kind != "block":
        raise UserError(f"--block belongs to --granularity block, not {kind}; leave it out")
    if settings.balance is not None and not 0 <= settings.balance <= 1:
        raise UserError(f"--balance is {settings.balance:g}; it must lie between 0 and 1")
    for name, least in (("block", 1), ("score_batches", 1), ("finetune_steps", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{flag(name)} is {value}; it must be at least {least}")


def check_model(settings: Settings) -> None:
    """Raise UserError for a form of the model that is unknown, or that a static table has not."""
    saved = (AS_LOADED, *DTYPES)
    for name, allowed in (("pooling", POOLINGS), ("head", HEADS), ("dtype", DTYPES[:2]), ("save_dtype", saved)):
        value = getattr(settings, name)
        if value not in (None, *allowed):
            raise UserError(f"--{flag(name)} {value}: unknown; use one of {', '.join(allowed)}")
        if settings.static is not None and value is not None and name != "save_dtype":
            raise UserError(f"--{name} does not go with --static, which is the mean of its tokens; leave it out")
    attention = settings.attn_implementation
    # A name with a slash would be code that transformers fetches.
    if attention is not None and not re.fullmatch(r"[a-z0-9_]+", attention):
        raise UserError(
            f"--attn-implementation {attention}: unknown; use a name of transformers, as in eager, sdpa or "
            "flash_attention_2"
        )


def check_text(settings: Settings) -> None:
    """Raise UserError for what is said about the text and does not go together."""
    if settings.format not in (None, *FORMATS):
        raise UserError(f"--format {settings.format}: unknown; use one of {', '.join(FORMATS)}")
    if settings.header and settings.no_header:
        raise UserError("--header and --no-header exclude each other; give one of them")
    if settings.train_file is None:
        for name in ("format", "columns", "header", "no_header"):
            if getattr(settings, name):
                raise UserError(f"--{flag(name)} says how to read --train-file; give one, or leave it out")
    apart = [name for name in ("query_prompt", "document_prompt") if getattr(settings, name) is not None]
    if settings.prompt is not None and apart:
        raise UserError(f"--prompt is for all texts and excludes --{flag(apart[0])}; give one of them")
    if settings.static is not None and (apart or settings.prompt is not None):
        raise UserError(
            f"--{flag(apart[0]) if apart else 'prompt'} does not go with --static: a table reads no context, so a "
            "prompt would add the same to every text; leave it out"
        )


def check_columns(settings: Settings, columns: int) -> None:
    """Raise UserError where the loss settings do not go with so many columns of text."""
    if settings.symmetric and columns > 2:
        raise UserError("--symmetric needs sentences or pairs; this text has hard negatives, so leave it out")
    if settings.hard_negative_weight and columns < 3:
        raise UserError("--hard-negative-weight needs a third column of hard negatives in --train-file")
