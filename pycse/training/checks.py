"""What settings may be, and which go together: checked before any work, one line for the first that does not.

Nothing heavy is imported here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pycse.choices import DIVERGENCES, SHUFFLES
from pycse.training.choices import DEVICES, GRANULARITIES, MEANS, POSITIVES, SCOPES, n_of_m
from pycse.training.errors import UserError
from pycse.training.options import flag
from pycse.training.recipes import PRUNING, RECIPES, recipes_with

if TYPE_CHECKING:
    from pycse.training.settings import Settings


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
    for name, least in (("batch_size", 2), ("steps", 1), ("max_length", 3), ("eval_steps", 1), ("seed", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{flag(name)} is {value}; it must be at least {least}")
    if settings.seed >= 2**32:
        raise UserError(f"--seed is {settings.seed}; it must be below 2**32")
    if not 0 <= settings.warmup < 1:
        raise UserError(f"--warmup is {settings.warmup:g}; it must be a share of the steps: at least 0, below 1")
    if not (settings.weight_decay >= 0 and math.isfinite(settings.weight_decay)):
        raise UserError(f"--weight-decay is {settings.weight_decay:g}; it must be a finite number, at least 0")


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


def check_columns(settings: Settings, columns: int) -> None:
    """Raise UserError where the loss settings do not go with 1, 2 or 3 columns of text."""
    if settings.symmetric and columns == 3:
        raise UserError("--symmetric needs sentences or pairs; this text has hard negatives, so leave it out")
    if settings.hard_negative_weight and columns != 3:
        raise UserError("--hard-negative-weight needs a third column of hard negatives in --train-file")
