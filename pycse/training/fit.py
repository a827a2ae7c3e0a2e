"""Training with sentence-transformers: evaluate, train, evaluate again."""

from __future__ import annotations

import gc
import time

from pycse.training import ranks
from pycse.training.choices import EVALUATIONS
from pycse.training.evaluate import ScoredPairs, Scores, by_set, evaluators
from pycse.training.run import Run


def fit(run: Run, encoder, loss, sets: list[ScoredPairs], scratch: str, console) -> None:
    """Evaluate, train and evaluate again with SentenceTransformerTrainer; fills in the results of the run."""
    from sentence_transformers import SentenceTransformerTrainer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from pycse.sentence_transformers import DistillCSELoss, TextCollator

    names = [pairs.name for pairs in sets]
    judges = evaluators(sets, max_length=encoder.max_seq_length)
    encoder.max_seq_length = run.settings.max_length
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=training_arguments(run, scratch),
        train_dataset=run.text.dataset(),
        loss=loss,
        evaluator=judges,
        data_collator=TextCollator(encoder.preprocess) if isinstance(loss, DistillCSELoss) else None,
    )
    if isinstance(loss, DistillCSELoss):
        trainer.add_callback(parts_callback(run, loss))
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)

    def scores_now() -> Scores:
        return by_set(trainer.evaluate(), names, "eval_")

    with progress_bar(console) as progress:
        task = progress.add_task("training", total=run.steps, loss="", score="")
        trainer.add_callback(progress_callback(progress, task, names[0]))
        ranks.seed_dropout(run.settings.seed)
        started = time.perf_counter()
        trainer.train()
        run.seconds["train"] = time.perf_counter() - started
    run.parts = ranks.mean(run.parts)  # as the trainer's loss is
    log = trainer.state.log_history
    run.loss = [(int(entry["step"]), entry["loss"]) for entry in log if "loss" in entry]
    run.scores = [
        (int(entry["step"]), by_set(entry, names, "eval_"))
        for entry in log
        if f"eval_{names[0]}_spearman_cosine" in entry
    ]
    if run.scores[-1][0] != run.steps:
        run.scores.append((run.steps, scores_now()))
    run.before, run.after = run.scores[0][1], run.scores[-1][1]
    if run.processes > 1:
        # Of the trainer's wrapper, which adds up gradients over the ranks, nothing may be left: a later training of the
        # same encoder has its own.
        loss.model = encoder
        trainer.accelerator.free_memory()
        del trainer, scores_now
        gc.collect()


def progress_bar(console):
    """A rich Progress; its tasks have the fields loss and score."""
    from rich import progress as bar

    columns = (
        bar.TextColumn("training"),
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TimeElapsedColumn(),
        bar.TimeRemainingColumn(),
        bar.TextColumn("{task.fields[loss]}  {task.fields[score]}"),
    )
    return bar.Progress(*columns, console=console)


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
        # By the training itself: transformers takes an encoder that it has evaluated before for one that is wrapped
        # already, and would not add up its gradients over several processes.
        eval_on_start=True,
        eval_steps=settings.eval_steps or max(1, run.steps // EVALUATIONS),
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen
        # Buffers (masks, positions) are equal on all ranks and stay so; written anew at every pass, they would spoil
        # the gradients of the one before where columns are embedded one by one.
        ddp_broadcast_buffers=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def parts_callback(run: Run, loss):
    """A transformers callback that keeps what a distillation's loss was made of, step by step."""
    from transformers import TrainerCallback

    class Parts(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            for name in ("contrastive", "distillation"):
                run.parts.setdefault(name, []).append(float(getattr(loss.latest, name)))

    return Parts()


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
