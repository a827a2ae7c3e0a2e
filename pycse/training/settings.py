"""Every choice of a training run, with its default, checked before any work is done.

`pycse --help` reads the defaults from this file: nothing heavy is imported here.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from pycse.problem import DIVERGENCES, SHUFFLES
from pycse.training.errors import UserError
from pycse.training.recipes import PRUNING, RECIPES, SHARED, recipes_with

BUNDLED = "bundled"  # name of the encoder that comes with the training extras
DEFAULT_LAYERS = "0,2,4"  # of the bundled MiniLM: every other layer, so that there is something to learn
DEFAULT_STEPS = 100
SHORTEST = 32  # of the lengths that a static table has by default
EVALUATIONS = 10  # during a run, when --eval-steps is not given
POSITIVES = ("dropout", "next")  # of single sentences: the same sentence again, or the one after it
DEVICES = ("auto", "cpu", "cuda", "mps")
POOLINGS = ("cls", "mean", "first-last")
HEADS = ("mlp",)
AS_LOADED = "as-loaded"
DTYPES = ("float32", "bfloat16", "float16")
GRANULARITIES = ("weight", "block", "head", "neuron")  # and n:m with numbers, as in 2:4
SCOPES = ("global", "layer")
MEANS = ("global", "layer")
# What --static changes of the defaults. A table is trained in large batches: a step is cheap, and negatives are many.
BATCH_SIZE, STATIC_BATCH_SIZE = 64, 2048
MAX_LENGTH, STATIC_MAX_LENGTH = 32, 256
STATIC_LR, STATIC_INIT_LR = 0.2, 0.01  # of a random table, and of one that knows something already


@dataclass
class Settings:
    """What to train, on what, how, and where to. None means: the default described in `pycse train --help`."""

    model: str | None = None
    layers: str | None = None
    static: int | None = None  # features of a table of tokens, which is trained instead of an encoder
    init: str | None = None
    dims: str | None = None
    train_file: str | None = None
    positives: str | None = None
    eval_files: tuple[str, ...] = ()
    out: str | None = None
    recipe: str = field(default=None)  # type: ignore[assignment]
    temperature: float = 0.05
    m: float | None = None
    teachers: tuple[str, ...] = ()
    cache_teachers: str | None = None
    distill_weight: float | None = None
    student_temperature: float | None = None
    teacher_temperature: float | None = None
    group_temperature: float | None = None
    group_p: float | None = None
    group_size: int | None = None
    span: tuple[int, int] | None = None
    shuffle: str | None = None
    divergence: str | None = None
    sparsity: float | None = None
    granularity: str | None = None
    scope: str | None = None
    block: int | None = None
    balance: float | None = None
    means: str | None = None
    score_batches: int | None = None
    finetune_steps: int | None = None
    hard_negative_weight: float = 0.0
    symmetric: bool = False
    backend: str = "auto"
    batch_size: int = field(default=None)  # type: ignore[assignment]
    steps: int | None = None
    epochs: float | None = None
    lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_length: int = field(default=None)  # type: ignore[assignment]
    eval_steps: int | None = None
    seed: int = 42
    device: str = "auto"
    bf16: bool = False
    pooling: str | None = None
    head: str | None = None
    dtype: str | None = None
    save_dtype: str = AS_LOADED
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    card_text: bool = False
    prunes: bool = False  # whatever the recipe: `pycse sparsify`

    def __post_init__(self) -> None:
        static = self.static is not None
        if self.recipe is None:
            self.recipe = "simcse" if static and not self.teachers else "distillcse"
        if self.batch_size is None:
            self.batch_size = STATIC_BATCH_SIZE if static else BATCH_SIZE
        if self.max_length is None:
            self.max_length = STATIC_MAX_LENGTH if static else MAX_LENGTH

    def check(self) -> None:
        """Raise UserError for the first setting that is out of its range or does not go with another."""
        if self.recipe not in RECIPES:
            raise UserError(f"--recipe {self.recipe}: unknown; use one of {', '.join(RECIPES)}")
        for name in dict.fromkeys(name for recipe in RECIPES.values() for name in recipe.own):
            if getattr(self, name) is not None and name not in RECIPES[self.recipe].own:
                others = " or ".join(recipes_with(name))
                raise UserError(
                    f"--{flag(name)} does not belong to --recipe {self.recipe}; leave it out or use --recipe {others}"
                )
        self.check_static()
        self.check_teachers()
        self.check_pruning()
        self.check_model()
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs exclude each other; give one of them")
        if self.positives not in (None, *POSITIVES):
            raise UserError(f"--positives {self.positives}: unknown; use one of {', '.join(POSITIVES)}")
        for name, allowed in (("device", DEVICES), ("shuffle", SHUFFLES), ("divergence", DIVERGENCES)):
            value = getattr(self, name)
            if value not in (None, *allowed):
                raise UserError(f"--{name} {value}: unknown; use one of {', '.join(allowed)}")
        for name in ("temperature", "epochs", "lr", "student_temperature", "teacher_temperature", "group_temperature"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"--{flag(name)} is {value:g}; it must be a finite number above 0")
        for name in ("m", "hard_negative_weight", "distill_weight"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"--{flag(name)} is {value:g}; it must be a finite number")
        for name, least in (("batch_size", 2), ("steps", 1), ("max_length", 3), ("eval_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{flag(name)} is {value}; it must be at least {least}")
        if self.seed >= 2**32:
            raise UserError(f"--seed is {self.seed}; it must be below 2**32")
        if not 0 <= self.warmup < 1:
            raise UserError(f"--warmup is {self.warmup:g}; it must be a share of the steps: at least 0, below 1")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise UserError(f"--weight-decay is {self.weight_decay:g}; it must be a finite number, at least 0")

    def check_static(self) -> None:
        """Raise UserError for settings that do not go with a static table, or need one."""
        if self.static is None:
            for name in ("init", "dims"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} belongs to --static; leave it out or give --static WIDTH")
            return
        if self.static < 1:
            raise UserError(f"--static is {self.static}; it must be at least 1")
        self.lengths  # noqa: B018 (raises)
        recipe = RECIPES[self.recipe]
        if recipe.prunes:
            others = " or ".join(name for name, other in RECIPES.items() if not other.prunes)
            raise UserError(f"--recipe {self.recipe} removes parameters of encoders, not of --static; use {others}")
        if recipe.teaches and not self.teachers:
            raise UserError(f"--recipe {self.recipe} with --static has no encoder to learn from; give --teacher")
        if self.layers is not None:
            raise UserError("--layers does not go with --static: a table has no layers; leave it out")
        if self.model is not None and self.init is not None:
            raise UserError("--model (its tokenizer alone) and --init (its embeddings too) exclude each other")
        if self.positives == "dropout":
            raise UserError(
                "--positives dropout does not go with --static: a table has no dropout, so both views of a sentence "
                "are equal; use next, or pairs in --train-file"
            )

    def check_teachers(self) -> None:
        """Raise UserError where the teachers do not go with the recipe, or there is nobody to learn from."""
        if not RECIPES[self.recipe].teaches:
            teaching = " or ".join(name for name, recipe in RECIPES.items() if recipe.teaches)
            for name, given in (("teacher", self.teachers), ("cache-teachers", self.cache_teachers)):
                if given:
                    raise UserError(
                        f"--recipe {self.recipe} takes no --{name}; leave it out or use --recipe {teaching}"
                    )
        # What is left of a pruned encoder learns from the whole one.
        elif not self.prunes and self.static is None and not self.teachers and self.model is not None and self.uncut:
            raise UserError(
                f"--recipe {self.recipe}: the encoder is uncut and would be its own teacher; give --teacher, "
                f"or --layers to cut it, or --recipe focal"
            )
        for name in self.teachers:
            if self.teachers.count(name) > 1:
                raise UserError(f"--teacher {name} is given {self.teachers.count(name)} times; give each teacher once")

    def check_pruning(self) -> None:
        """Raise UserError for settings of the removal of parameters that do not go together, or with the recipe."""
        if not (self.prunes or RECIPES[self.recipe].prunes):
            recipe = " or ".join(name for name, recipe in RECIPES.items() if recipe.prunes)
            for name in PRUNING:
                if getattr(self, name) is not None:
                    raise UserError(
                        f"--{flag(name)} does not belong to --recipe {self.recipe}; "
                        f"leave it out or use --recipe {recipe}"
                    )
            return
        for name, allowed in (("scope", SCOPES), ("means", MEANS)):
            value = getattr(self, name)
            if value not in (None, *allowed):
                raise UserError(f"--{name} {value}: unknown; use one of {', '.join(allowed)}")
        kind = self.granularity or PRUNING["granularity"]
        if kind not in GRANULARITIES and n_of_m(kind) is None:
            raise UserError(
                f"--granularity {kind}: unknown; use one of {', '.join(GRANULARITIES)}, "
                f"or n:m with 1 <= n <= m as in 2:4"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise UserError(f"--sparsity is {self.sparsity:g}; it must be a share: at least 0, below 1")
        if (numbers := n_of_m(kind)) is not None:
            n, m = numbers
            if self.sparsity is not None and abs(self.sparsity - (1 - n / m)) > 1e-6:
                raise UserError(
                    f"--sparsity {self.sparsity:g} contradicts --granularity {kind}, which removes {1 - n / m:g}; "
                    f"leave it out"
                )
            if self.scope == "global":
                raise UserError(f"--scope global contradicts --granularity {kind}, which has the same share everywhere")
        if self.block is not None and kind != "block":
            raise UserError(f"--block belongs to --granularity block, not {kind}; leave it out")
        if self.balance is not None and not 0 <= self.balance <= 1:
            raise UserError(f"--balance is {self.balance:g}; it must lie between 0 and 1")
        for name, least in (("block", 1), ("score_batches", 1), ("finetune_steps", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{flag(name)} is {value}; it must be at least {least}")

    def check_model(self) -> None:
        """Raise UserError for settings of the model's form and files that are unknown, or do not go with a table."""
        for name, allowed in (
            ("pooling", POOLINGS),
            ("head", HEADS),
            ("dtype", DTYPES),
            ("save_dtype", (AS_LOADED, *DTYPES)),
        ):
            value = getattr(self, name)
            if value not in (None, *allowed):
                raise UserError(f"--{flag(name)} {value}: unknown; use one of {', '.join(allowed)}")
            if self.static is not None and name in ("pooling", "head", "dtype") and value is not None:
                raise UserError(f"--{name} does not go with --static, which is the mean of its tokens; leave it out")
        if self.dtype == "float16":
            raise UserError("--dtype float16: gradients of that range are lost in training; use bfloat16, or --bf16")
        if self.attn_implementation is not None and not re.fullmatch(r"[a-z0-9_]+", self.attn_implementation):
            raise UserError(
                f"--attn-implementation {self.attn_implementation}: unknown; use a name of transformers, as in eager, "
                "sdpa or flash_attention_2"
            )

    def check_columns(self, columns: int) -> None:
        """Raise UserError where the loss settings do not go with 1, 2 or 3 columns of text."""
        if self.symmetric and columns == 3:
            raise UserError("--symmetric needs sentences or pairs; this text has hard negatives, so leave it out")
        if self.hard_negative_weight and columns != 3:
            raise UserError("--hard-negative-weight needs a third column of hard negatives in --train-file")

    def loss_arguments(self) -> dict:
        """Keyword arguments for the loss of the recipe."""
        own = {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in RECIPES[self.recipe].own.items()
        }
        return own | {name: getattr(self, name) for name in SHARED}

    def pruning(self) -> dict:
        """Settings of the removal of parameters, with their defaults."""
        chosen = {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in PRUNING.items()
        }
        if (numbers := n_of_m(chosen["granularity"])) is not None:
            chosen["sparsity"] = 1 - numbers[0] / numbers[1]
        return chosen

    @property
    def uncut(self) -> bool:
        return (self.layers or "all").strip().lower() == "all"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of a static table's embeddings, the longest first; UserError where --dims cannot be used."""
        width = self.static or 0
        if self.dims is None:
            halves = takewhile(lambda length: length >= SHORTEST, (width >> k for k in range(1, width.bit_length())))
            return (width, *halves)
        try:
            dims = [int(part) for part in self.dims.split(",")]
        except ValueError:
            raise UserError(f"--dims {self.dims!r}: give lengths, as in 1024,512,256") from None
        for length in dims:
            if not 1 <= length <= width:
                raise UserError(f"--dims {self.dims}: {length} is no length of --static {width}; give 1 to {width}")
            if dims.count(length) > 1:
                raise UserError(f"--dims {self.dims}: {length} is there {dims.count(length)} times; give each once")
        if width not in dims:
            raise UserError(
                f"--dims {self.dims}: features beyond {max(dims)} would not be trained; add {width}, or use "
                f"--static {max(dims)}"
            )
        return tuple(sorted(dims, reverse=True))

    @property
    def learning_rate(self) -> float:
        if self.lr is not None:
            return self.lr
        if self.static is not None:
            return STATIC_LR if self.init is None else STATIC_INIT_LR
        return RECIPES[self.recipe].lr

    @property
    def positives_of_sentences(self) -> str:
        """What single sentences are pulled to.

        The default text is running prose: the next sentence has mostly the same subject, and as a positive it taught
        the cut MiniLM more than dropout did, with every recipe. The lines of a user's file need not follow one another;
        a static table has no dropout, and takes them as if they did.
        """
        return self.positives or ("dropout" if self.train_file and self.static is None else "next")

    def as_dict(self) -> dict:
        """For metrics.json: everything as the run used it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {name: list(getattr(self, name)) for name in ("eval_files", "teachers")}
        pruning = self.pruning() if self.prunes or RECIPES[self.recipe].prunes else {}
        dims = {} if self.static is None else {"dims": list(self.lengths)}
        return values | self.loss_arguments() | pruning | lists | dims | {"lr": self.learning_rate}


def n_of_m(granularity: str) -> tuple[int, int] | None:
    """ "2:4" -> (2, 4); None for anything else, and for an n that is not in [1, m]."""
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", granularity)
    if found is None:
        return None
    n, m = int(found[1]), int(found[2])
    return (n, m) if 1 <= n <= m else None


def flag(name: str) -> str:
    """Field name -> how the option is written."""
    return name.replace("_", "-")


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
