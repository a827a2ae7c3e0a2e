"""Every choice of a training run: its default, its help on the command line, and what follows from it.

The options of `pycse train` and `pycse sparsify`, and the keys of --config, are the fields of Settings. Nothing heavy
is imported here: `pycse --help` reads this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import takewhile
from typing import Any

from pycse.choices import DIVERGENCES, SHUFFLES
from pycse.training import checks
from pycse.training.choices import (
    BATCH_SIZE,
    BUNDLED,
    DEFAULT_LAYERS,
    DEFAULT_STEPS,
    DEVICES,
    EVALUATIONS,
    GRANULARITIES,
    MAX_LENGTH,
    MEANS,
    SCOPES,
    SHORTEST,
    STATIC_BATCH_SIZE,
    STATIC_INIT_LR,
    STATIC_LR,
    STATIC_MAX_LENGTH,
    n_of_m,
)
from pycse.training.errors import UserError
from pycse.training.options import option
from pycse.training.recipes import PRUNING, RECIPES, SHARED

DISTILL = RECIPES["distillcse"].own
PRUNES = " or ".join(name for name, recipe in RECIPES.items() if recipe.prunes)
DEVICE_HELP = f"One of {', '.join(DEVICES)}; auto takes a GPU where there is one."
EVAL_HELP = "Score, sentence1, sentence2 a line, tab-separated; repeatable."
DEFAULT_RECIPE = "distillcse"


def of_pruning(default: Any, help: str) -> Any:
    """An option of recipes that prune, and of sparsify."""
    return option(default, f"{PRUNES}: {help}", sparsify=help)


@dataclass
class Settings:
    """What to train, on what, how, and where to. None means: the default described in `pycse train --help`."""

    model: str | None = option(
        None,
        "Hugging Face id or folder of the encoder to start from. Default: the all-MiniLM-L6-v2 that comes with the "
        "training extras.",
        sparsify="Hugging Face id or folder of the encoder. Default: the all-MiniLM-L6-v2 that comes with the training "
        "extras.",
        path=True,
    )
    layers: str | None = option(
        None,
        f"Layers to keep, from 0, as in 0,2,4, or all. Default: {DEFAULT_LAYERS} of the default model, all of another.",
    )
    static: int | None = option(
        None,
        "Train a static table of this many features a token instead of an encoder: a text is the mean of its tokens. "
        "--model then gives the tokenizer alone.",
        metavar="WIDTH",
    )
    init: str | None = option(
        None,
        "--static: start from this encoder's embeddings of its tokens, or from another static table. Hugging Face id, "
        f"folder, or {BUNDLED} for the encoder of the training extras. Default: random.",
        metavar="MODEL",
        path=True,
    )
    dims: str | None = option(
        None,
        "--static: lengths that embeddings shall be good at, as in 1024,512,256. Default: the width, halved down to "
        f"{SHORTEST}.",
    )
    train_file: str | None = option(
        None,
        "Text, one example a line: a sentence, or two or three tab-separated columns (a pair, or a pair and a hard "
        "negative). Default: English Wikipedia sentences that come with the training extras.",
        sparsify="Text to score and train on, one example a line, as for pycse train. Pairs are the positives of the "
        "scores; otherwise dropout makes them. Default: English Wikipedia sentences that come with the training "
        "extras.",
        path=True,
    )
    positives: str | None = option(
        None,
        "What a single sentence is pulled to: dropout (itself under another dropout mask, as in SimCSE) or next (the "
        "sentence after it). Default: dropout for --train-file, next for the default text and --static.",
    )
    eval_files: tuple[str, ...] = option((), EVAL_HELP, flag="eval-file", metavar="FILE", sparsify=True, path=True)
    out: str | None = option(
        None,
        "New or empty folder to write to. Default: runs/RECIPE-DATE-TIME, runs/static-DATE-TIME.",
        sparsify="New or empty folder to write to. Default: runs/sparsify-DATE-TIME.",
        path=True,
    )
    recipe: str = option(  # type: ignore[assignment]
        None,
        f"One of {', '.join(RECIPES)}. distillcse learns a teacher's similarities beside InfoNCE; focal is "
        "Focal-InfoNCE; simcse is InfoNCE; sparsecse is InfoNCE, then removes parameters and trains the rest. "
        f"Default: {DEFAULT_RECIPE}; simcse for --static without --teacher.",
        sparsify=f"Of --finetune-steps, one of {', '.join(name for name, one in RECIPES.items() if not one.prunes)}. "
        f"distillcse: the encoder before the removal teaches what is left of it. Default: {DEFAULT_RECIPE}.",
    )
    temperature: float = option(0.05, "Temperature of the contrastive loss.")
    m: float | None = option(
        None,
        f"Hardness of Focal-InfoNCE. Default: {RECIPES['focal'].own['m']} for focal; none for distillcse, whose "
        "contrastive part is then InfoNCE.",
    )
    teachers: tuple[str, ...] = option(
        (),
        "Hugging Face id or folder of an encoder to learn from, recipe distillcse; repeatable, of any width. Default: "
        "the encoder that --model and --layers cut.",
        flag="teacher",
        metavar="ENCODER",
        path=True,
    )
    cache_teachers: str | None = option(
        None,
        "Folder that keeps the teachers' embeddings, for later epochs and runs; it may be shared.",
        metavar="FOLDER",
        path=True,
    )
    distill_weight: float | None = option(
        None, f"distillcse: factor of the distillation. Default: {DISTILL['distill_weight']:g}."
    )
    student_temperature: float | None = option(
        None, f"distillcse: of the student's similarities. Default: {DISTILL['student_temperature']}."
    )
    teacher_temperature: float | None = option(
        None, f"distillcse: of the teachers' similarities. Default: {DISTILL['teacher_temperature']}."
    )
    group_temperature: float | None = option(
        None, f"distillcse: of the mass that --group-p counts. Default: {DISTILL['group_temperature']:g}."
    )
    group_p: float | None = option(
        None, "distillcse: probability mass of a group of ranks that is shuffled. Default: 0.1."
    )
    group_size: int | None = option(None, "distillcse: instead of --group-p, ranks in a group.")
    span: tuple[int, int] | None = option(
        None, "distillcse: instead of --group-p, the ranks (start, end) of the only group.", metavar="A B"
    )
    shuffle: str | None = option(
        None,
        f"distillcse: one of {', '.join(SHUFFLES)}. sample shuffles the teachers' probabilities inside each group; "
        f"expected gives each member the group's mean. Default: {DISTILL['shuffle']}.",
    )
    divergence: str | None = option(
        None, f"distillcse: one of {', '.join(DIVERGENCES)}. Default: {DISTILL['divergence']}."
    )
    sparsity: float | None = of_pruning(
        None,
        f"Share of the weights, blocks, heads or neurons to remove, of 0 to below 1. Default: {PRUNING['sparsity']}.",
    )
    granularity: str | None = of_pruning(
        None,
        f"What is removed: one of {', '.join(GRANULARITIES)}, or n:m as in 2:4, which keeps 2 of every 4 weights. "
        f"Default: {PRUNING['granularity']}.",
    )
    scope: str | None = of_pruning(
        None,
        f"One of {', '.join(SCOPES)}: the share of all, or of each layer. Default: layer for neuron and n:m, else "
        "global.",
    )
    block: int | None = of_pruning(None, f"Side of a block, --granularity block. Default: {PRUNING['block']}.")
    balance: float | None = of_pruning(
        None, f"Share of alignment in the scores; the rest is uniformity's. Default: {PRUNING['balance']}."
    )
    means: str | None = of_pruning(
        None,
        f"What scores are divided by, one of {', '.join(MEANS)}: the mean of all parameters, or of each. "
        f"Default: {PRUNING['means']}.",
    )
    score_batches: int | None = of_pruning(
        None, f"Batches of text to score parameters on. Default: {PRUNING['score_batches']}."
    )
    finetune_steps: int | None = option(
        None,
        f"{PRUNES}: steps after the removal. Default: half of --steps.",
        sparsify="Steps of training after the removal, under the masks. Default: 0.",
    )
    hard_negative_weight: float = option(0.0, "Added to the logits of a row's own hard negatives.")
    symmetric: bool = option(False, "Mean of the loss in both directions.")
    backend: str = option("auto", "Backend of the loss; pycse info lists them.")
    batch_size: int = option(  # type: ignore[assignment]
        None,
        f"Rows a step; of each process where there are several. Default: {BATCH_SIZE}; {STATIC_BATCH_SIZE} for "
        "--static.",
        sparsify=f"Rows a batch. Default: {BATCH_SIZE}.",
    )
    steps: int | None = option(None, f"Training steps. Default: {DEFAULT_STEPS}.")
    epochs: float | None = option(None, "Times through the text, instead of --steps.")
    lr: float | None = option(
        None,
        f"Peak learning rate, linear warm-up and decay. Default: {RECIPES['distillcse'].lr:g} for distillcse, "
        f"{RECIPES['focal'].lr:g} for the others; {STATIC_LR:g} for --static, {STATIC_INIT_LR:g} with --init.",
        sparsify="Peak learning rate of --finetune-steps. Default: the recipe's.",
    )
    warmup: float = option(0.1, "Share of the steps that warm up.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_length: int = option(  # type: ignore[assignment]
        None,
        "Tokens that training text is cut at; evaluation reads as far as the encoder can. Default: "
        f"{MAX_LENGTH}; {STATIC_MAX_LENGTH} for --static.",
        sparsify=f"Tokens that text is cut at, but for evaluation. Default: {MAX_LENGTH}.",
    )
    eval_steps: int | None = option(None, f"Steps between evaluations. Default: {EVALUATIONS} evaluations a run.")
    seed: int = option(42, "Seed of dropout and of the order of the text.", sparsify=True)
    device: str = option("auto", DEVICE_HELP, sparsify=True)
    bf16: bool = option(False, "Mixed precision in bfloat16.")
    prunes: bool = field(default=False)  # whatever the recipe: `pycse sparsify`

    def __post_init__(self) -> None:
        static = self.static is not None
        if self.recipe is None:
            self.recipe = "simcse" if static and not self.teachers else DEFAULT_RECIPE
        if self.batch_size is None:
            self.batch_size = STATIC_BATCH_SIZE if static else BATCH_SIZE
        if self.max_length is None:
            self.max_length = STATIC_MAX_LENGTH if static else MAX_LENGTH

    def check(self) -> None:
        """Raise UserError for the first setting that is out of its range or does not go with another."""
        checks.check(self)

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
