"""Every choice of a training run: its default, its help on the command line, and what follows from it.

The options of `pycse train` and `pycse sparsify`, and the keys of --config, are the fields of Settings. Nothing heavy
is imported here: `pycse --help` reads this file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from pycse.choices import DIVERGENCES, SHUFFLES
from pycse.training import checks
from pycse.training.choices import (
    AS_LOADED,
    BATCH_SIZE,
    BUNDLED,
    DEFAULT_LAYERS,
    DEFAULT_STEPS,
    DEVICES,
    DTYPES,
    EVAL_BATCH_SIZE,
    EVALUATIONS,
    FORMATS,
    GRANULARITIES,
    KEEP,
    MAX_LENGTH,
    MEANS,
    POOLINGS,
    REPORTERS,
    SAVE_MINUTES,
    SCHEDULES,
    SCOPES,
    SHORTEST,
    STATIC_BATCH_SIZE,
    STATIC_EVAL_BATCH_SIZE,
    STATIC_INIT_LR,
    STATIC_LR,
    STATIC_MAX_LENGTH,
    n_of_m,
)
from pycse.training.errors import UserError
from pycse.training.options import flag, option, option_of
from pycse.training.recipes import PRUNING, RECIPES, SHARED

DISTILL = RECIPES["distillcse"].own
PRUNES = " or ".join(name for name, recipe in RECIPES.items() if recipe.prunes)
DEVICE_HELP = f"One of {', '.join(DEVICES)}; auto takes a GPU where there is one."
EVAL_HELP = (
    "Score, sentence1, sentence2 a line, tab-separated; or STS-B's own files; or columns of these names in CSV, JSONL "
    "or Parquet. Repeatable."
)
TRUST_HELP = "Run Python code that lies in a model's folder. Only for authors that you trust."
PICKLE_HELP = "Read weights that are no safetensors (pytorch_model.bin), by torch's restricted unpickler."
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
        "Text, one example a line: a sentence, a pair, or a pair and its hard negatives, tab-separated; or CSV, JSONL, "
        "Parquet; or a pipe. Default: English Wikipedia sentences that come with the training extras.",
        sparsify="Text to score and train on, one example a line, as for pycse train. Pairs are the positives of the "
        "scores; otherwise dropout makes them. Default: English Wikipedia sentences that come with the training "
        "extras.",
        path=True,
    )
    format: str | None = option(
        None,
        f"How --train-file is written, one of {', '.join(FORMATS)}. In txt and tsv cells are between tabs and quotes "
        "are text. Default: by its name, else txt.",
        sparsify=True,
    )
    columns: str | None = option(
        None,
        "Columns of --train-file by name or number from 1: anchor, positive, hard negatives. Default: by known names, "
        "as anchor,positive or sentence1,sentence2, else in their order.",
        metavar="A,B,C",
        sparsify=True,
    )
    header: bool = option(
        False,
        "The first line of --train-file names its columns. Default: where it has known names.",
        sparsify=True,
    )
    no_header: bool = option(False, "The first line of --train-file is text, whatever it says.", sparsify=True)
    prompt: str | None = option(
        None, "Put before every text, in training and evaluation, and saved with the model.", sparsify=True
    )
    query_prompt: str | None = option(
        None, "Put before anchors, and before the first text of a pair in evaluation.", sparsify=True
    )
    document_prompt: str | None = option(
        None, "Put before positives and negatives, and before the second text of a pair in evaluation.", sparsify=True
    )
    positives: str | None = option(
        None,
        "What a single sentence is pulled to: dropout (itself under another dropout mask, as in SimCSE), next (the "
        "sentence after it) or switch-case (itself, some words' first letters in the other case, as in CARDS). "
        "Default: dropout for --train-file, next for the default text and --static.",
    )
    eval_files: tuple[str, ...] = option((), EVAL_HELP, flag="eval-file", metavar="FILE", sparsify=True, path=True)
    no_lee: bool = option(
        False, "Leave the Lee documents out of the evaluation; --eval-file is then needed.", sparsify=True
    )
    eval_batch_size: int = option(  # type: ignore[assignment]
        None,
        f"Texts embedded at a time in evaluation. Default: {EVAL_BATCH_SIZE}; {STATIC_EVAL_BATCH_SIZE} for --static.",
        sparsify=f"Texts embedded at a time in evaluation. Default: {EVAL_BATCH_SIZE}.",
    )
    out: str | None = option(
        None,
        "New or empty folder to write to. Default: runs/RECIPE-DATE-TIME, runs/static-DATE-TIME.",
        sparsify="New or empty folder to write to. Default: runs/sparsify-DATE-TIME.",
        path=True,
        session=True,
    )
    resume: str | None = option(
        None,
        "Go on with the run in this folder, which was stopped: from its latest checkpoint, with its settings.",
        metavar="RUN",
        sparsify=True,
        path=True,
        session=True,
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
    schedule: str = option(
        "linear", f"Of the learning rate after the warm-up, one of {', '.join(SCHEDULES)}.", metavar="NAME"
    )
    max_grad_norm: float = option(1.0, "Gradients longer than this are cut to it; 0 cuts none.")
    grad_accumulation: int = option(
        1, "Batches whose gradients are added up for a step. Each has its own negatives; for more of them see --cached."
    )
    cached: int | None = option(
        None,
        "Embed this many rows of a batch at a time, and again after the loss (GradCache): the negatives of a large "
        "--batch-size in the memory of a small one.",
        metavar="ROWS",
    )
    gradient_checkpointing: bool = option(False, "Keep fewer activations and compute them twice: less memory.")
    workers: int = option(0, "Processes that read text beside the training.", session=True)
    max_length: int = option(  # type: ignore[assignment]
        None,
        "Tokens that training text is cut at; evaluation reads as far as the encoder can. Default: "
        f"{MAX_LENGTH}; {STATIC_MAX_LENGTH} for --static.",
        sparsify=f"Tokens that text is cut at, but for evaluation. Default: {MAX_LENGTH}.",
    )
    eval_steps: int | None = option(None, f"Steps between evaluations. Default: {EVALUATIONS} evaluations a run.")
    keep: str = option(
        "last",
        f"Weights that are saved, one of {', '.join(KEEP)}: the last, or those with the best Spearman on --best-by.",
    )
    best_by: str | None = option(
        None, "--keep best: evaluation set that decides. Default: the first --eval-file, else lee.", metavar="SET"
    )
    dry_run: bool = option(
        False,
        "Check everything, take a few steps, say what the run would take in time and memory, and write nothing.",
        session=True,
    )
    patience: int | None = option(
        None, "--keep best: stop after this many evaluations without a better one.", metavar="N"
    )
    save_steps: int | None = option(
        None,
        f"Steps between checkpoints, for --resume. Default: a checkpoint every {SAVE_MINUTES} minutes. The last two "
        "are kept.",
        sparsify=True,
        session=True,
    )
    report_to: tuple[str, ...] = option(
        (),
        f"Where the trainer logs to as well, one of {', '.join(REPORTERS)}, where installed; repeatable.",
        metavar="NAME",
        session=True,
    )
    seed: int = option(42, "Seed of dropout and of the order of the text.", sparsify=True)
    device: str = option("auto", DEVICE_HELP, sparsify=True)
    bf16: bool = option(False, "Mixed precision in bfloat16.")
    pooling: str | None = option(
        None,
        f"How tokens become an embedding, one of {', '.join(POOLINGS)}: the first token, the mean, or the mean of the "
        "first and the last layer. Default: the model's own.",
    )
    head: str | None = option(
        None,
        "mlp: a linear layer and tanh behind the pooling while training, gone in what is evaluated and saved, as in "
        "SimCSE. Default: none.",
    )
    save_dtype: str = option(
        AS_LOADED, f"Of the saved weights, one of {', '.join((AS_LOADED, *DTYPES))}.", sparsify=True
    )
    dtype: str | None = option(
        None,
        "Of the weights in training, float32 or bfloat16, which saves memory and loses small steps. Default: float32; "
        "teachers stay as they are stored.",
    )
    attn_implementation: str | None = option(
        None, "Of transformers, as in eager, sdpa or flash_attention_2. Default: the model's own.", sparsify=True
    )
    trust_remote_code: bool = option(False, TRUST_HELP, sparsify=True)
    allow_pickle: bool = option(False, PICKLE_HELP, sparsify=True)
    card_text: bool = option(False, "Quote some rows of the training text in the model's README.md.", sparsify=True)
    prunes: bool = field(default=False)  # whatever the recipe: `pycse sparsify`

    def __post_init__(self) -> None:
        for name, known in FIELDS.items():
            value = getattr(self, name)
            if known.path and value:
                setattr(self, name, tuple(map(home, value)) if isinstance(value, tuple) else home(value))
        static = self.static is not None
        if self.recipe is None:
            self.recipe = "simcse" if static and not self.teachers else DEFAULT_RECIPE
        if self.batch_size is None:
            self.batch_size = STATIC_BATCH_SIZE if static else BATCH_SIZE
        if self.max_length is None:
            self.max_length = STATIC_MAX_LENGTH if static else MAX_LENGTH
        if self.eval_batch_size is None:
            self.eval_batch_size = STATIC_EVAL_BATCH_SIZE if static else EVAL_BATCH_SIZE

    def check(self) -> None:
        """Raise UserError for the first setting that is out of its range or does not go with another."""
        checks.check(self)

    @property
    def prompts(self) -> tuple[str | None, str | None]:
        """What stands before anchors and before the other columns; before both texts of a pair in evaluation."""
        if self.prompt is not None:
            return self.prompt, self.prompt
        if self.query_prompt is None and self.document_prompt is None:
            return None, None
        return self.query_prompt or "", self.document_prompt or ""  # without a prompt is not with the encoder's own

    def column_prompts(self, columns: Sequence[str]) -> dict[str, str] | None:
        """In the words of sentence-transformers' trainer; None where there are none."""
        query, document = self.prompts
        given = {name: document if k else query for k, name in enumerate(columns)}
        return {name: prompt for name, prompt in given.items() if prompt} or None

    @property
    def heading(self) -> bool | None:
        """Whether the first line of the text names its columns; None: where it has known names."""
        return True if self.header else False if self.no_header else None

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

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json: everything as the run used it."""
        pruning = self.pruning() if self.prunes or RECIPES[self.recipe].prunes else {}
        dims = {} if self.static is None else {"dims": list(self.lengths)}
        return self.plain() | self.to_repeat() | self.loss_arguments() | pruning | dims | {"lr": self.learning_rate}

    def plain(self) -> dict[str, Any]:
        """Every field, as JSON has it."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_repeat(self) -> dict[str, Any]:
        """What was chosen, without how the run is carried out; files and folders by their whole names."""
        chosen = {}
        for one in fields(self):
            known, value = option_of(one), getattr(self, one.name)
            if known is None or known.session or value is None or value == ():
                continue
            if known.path:
                value = [whole(path) for path in value] if isinstance(value, tuple) else whole(value)
            chosen[one.name] = list(value) if isinstance(value, tuple) else value
        return chosen

    def as_toml(self) -> str:
        """A file for --config that repeats the run."""
        import tomli_w

        names = {one.name: known.flag or flag(one.name) for one in fields(self) if (known := option_of(one))}
        command = "sparsify" if self.prunes else "train"
        values = {names[name]: value for name, value in self.to_repeat().items() if name not in self.given_by(command)}
        return f"# pycse {command} --config run.toml\n{tomli_w.dumps(values)}"

    @staticmethod
    def given_by(command: str) -> tuple[str, ...]:
        """Settings that a command decides itself."""
        return () if command == "train" else ("layers", *(n for n in FIELDS if FIELDS[n].sparsify is None))


def home(path: str) -> str:
    """~ is the user's folder, also in --out=~/x, which the shell leaves as it is."""
    return os.path.expanduser(path)


def whole(path: str) -> str:
    """The whole name of a file or folder that is here; what is none, a name on the hub, stays."""
    found = Path(home(path))
    return str(found.absolute()) if found.exists() else path


FIELDS = {one.name: known for one in fields(Settings) if (known := option_of(one)) is not None}
