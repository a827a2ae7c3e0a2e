"""One phase of a run: evaluate, train with sentence-transformers, evaluate again; or go on where a checkpoint ends."""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

from pycse.training import ranks, signals
from pycse.training.checkpoints import Checkpoints
from pycse.training.choices import EVALUATIONS
from pycse.training.errors import Failed, UserError
from pycse.training.eval_sets import ScoredPairs
from pycse.training.evaluate import by_set, evaluator, metric
from pycse.training.folder import LAST_GOOD, WORK, save_or_rescue
from pycse.training.heads import without_head
from pycse.training.progress import say, shown
from pycse.training.run import Run
from pycse.training.saving import write
from pycse.training.settings import Settings
from pycse.training.signals import Interrupted

STATE = "trainer_state.json"  # of transformers, in each checkpoint


def fit(
    run: Run, encoder: Any, loss: Any, sets: list[ScoredPairs], out: Path, console: Any, phase: str = "train"
) -> None:
    """Evaluate, train and evaluate again with SentenceTransformerTrainer; fills in the results of the run.

    Args:
        out: the run's folder; where it has checkpoints of this phase, the training goes on from the latest.
        phase: name of the training among those of the run.

    Raises:
        Interrupted: a signal came; a checkpoint was written after its step.
        Failed: the loss is not finite; the weights before that step are in the folder.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from pycse.sentence_transformers import DistillCSELoss, LossState, TextCollator
    from pycse.training.trainer import Course, RunTrainer, put_weights

    settings, names = run.settings, [pairs.name for pairs in sets]
    judge = judge_of(settings, names)
    evaluation = evaluator(sets, settings.eval_batch_size, encoder.max_seq_length, settings.prompts)
    encoder.max_seq_length = settings.max_length
    checkpoints = Checkpoints(out / "checkpoints", phase, settings.save_steps, best_of)
    latest = checkpoints.latest()
    done = 0 if latest is None else json.loads((latest / STATE).read_text())["global_step"]
    rows = settings.batch_size * settings.grad_accumulation * run.processes
    with shown(console, run.steps, rows, done) as progress:
        course = Course(run, checkpoints, loss, progress, evaluation, names[0], judge, console)
        trainer = RunTrainer(
            model=encoder,
            args=training_arguments(run, out, eval_on_start=latest is None),
            train_dataset=run.text.dataset(),
            loss=loss,
            evaluator=evaluation,
            data_collator=TextCollator(encoder.preprocess) if isinstance(loss, DistillCSELoss) else None,
            callbacks=[LossState(loss), course],
            course=course,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        ranks.seed_dropout(settings.seed)
        course.started = time.perf_counter()
        try:
            # The trainer would take one step more from a checkpoint of the last.
            if latest is not None and (done >= run.steps or is_complete(latest, settings.patience)):
                take_up(trainer, latest)
            else:
                if latest is not None:
                    console.print(f"going on after step {done}")
                trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
                course.complete = not course.signal
                if course.complete and run.more_to_come:
                    trainer._save_checkpoint(trainer.model, None)
        except Failed as error:
            words = rescued(encoder, out) if ranks.first() else ""  # the weights of before the step
            collect(run, trainer, course, names)
            raise Failed(f"{error}. {words}") from None
        # A signal during the last step waits for the end of the run, where this phase is not its end.
        number = course.signal or (max(ranks.exchange(signals.caught())) if run.more_to_come else 0)
        if number:
            raise Interrupted(number, in_words(course.saved, trainer.state.global_step, out, settings))
        run.seconds["train"], run.earlier = course.seconds, course.before
        collect(run, trainer, course, names)
        reached = trainer.state.global_step
        if reached < run.steps:
            run.stopped = f"after step {reached} of {run.steps}: {settings.patience} evaluations without a better one"
            run.steps = reached
        if run.scores[-1][0] != run.steps:
            run.scores.append((run.steps, by_set(trainer.evaluate(), names, "eval_")))
        run.before, run.after = run.scores[0][1], run.scores[-1][1]
        if course.best is not None:
            run.kept = int(course.best[0])
            if run.kept != run.steps and not checkpoints.best(run.kept).is_dir():
                say(console, f"{checkpoints.best(run.kept)} has gone; the last weights are kept", style="red")
                run.kept = run.steps
            elif run.kept != run.steps:
                put_weights(encoder, checkpoints.best(run.kept))
                run.after = dict(run.scores)[run.kept]
    if run.processes > 1:
        # Of the trainer's wrapper, which adds up gradients over the ranks, nothing may be left: a later training of the
        # same encoder has its own.
        loss.model = encoder
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()


def judge_of(settings: Settings, names: list[str]) -> str:
    """The evaluation set whose score is the best one's."""
    if settings.best_by is not None:
        return settings.best_by
    return names[1] if len(names) > 1 and settings.eval_files else names[0]


def collect(run: Run, trainer: Any, course: Any, names: list[str]) -> None:
    """Take what the trainer has logged."""
    run.parts = ranks.mean(run.parts)  # as the trainer's loss is
    log = trainer.state.log_history
    steps = [entry for entry in log if "loss" in entry]
    run.loss = [(int(entry["step"]), float(entry["loss"])) for entry in steps]
    run.rates = [(float(entry["learning_rate"]), float(entry.get("grad_norm", "nan"))) for entry in steps]
    run.scores = [
        (int(entry["step"]), by_set(entry, names, "eval_"))
        for entry in log
        if metric(names[0], "spearman", "eval_") in entry
    ]


def best_of(checkpoint: Path) -> int | None:
    """Step of the best evaluation that a checkpoint knows of."""
    best = course_of(checkpoint)["best"]
    return None if best is None else int(best[0])


def is_complete(checkpoint: Path, patience: int | None) -> bool:
    """Whether a checkpoint is the end of its phase."""
    course = course_of(checkpoint)
    return bool(course["complete"]) or (patience is not None and course["since"] >= patience)


def rescued(encoder: Any, out: Path) -> str:
    """Save the weights that are left; where they are, in words."""

    def save(folder: Path) -> None:
        with without_head(encoder):
            write(encoder, folder)

    try:
        save_or_rescue(save, out / LAST_GOOD)
    except UserError as error:
        return str(error)
    return f"The weights before it are in {out / LAST_GOOD}"


def course_of(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state["stateful_callbacks"]["Course"]["attributes"]


def take_up(trainer: Any, checkpoint: Path) -> None:
    """Be where a training was at its end."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ in ("Course", "LossState"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control)


def in_words(saved: bool, step: int, out: Path, settings: Settings) -> str:
    """What a signal left."""
    if not saved:
        return f"stopped after step {step}, whose checkpoint could not be written"
    command = "sparsify" if settings.prunes else "train"
    return f"stopped after step {step}; go on with: pycse {command} --resume {out}"


def training_arguments(run: Run, out: Path, eval_on_start: bool) -> Any:
    """The run's settings in the words of transformers."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    settings = run.settings
    more: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        known = SentenceTransformerTrainingArguments.__dataclass_fields__  # renamed in transformers 5.24
        more["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    if settings.workers:  # a forked tokenizer waits for threads that it has not
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if "tensorboard" in settings.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / "logs"))
    return SentenceTransformerTrainingArguments(
        output_dir=str(out / WORK),  # nothing is kept there
        max_steps=run.steps,
        prompts=settings.column_prompts(run.text.columns),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accumulation,
        dataloader_drop_last=True,
        dataloader_num_workers=settings.workers,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup * run.steps if settings.warmup * run.steps >= 1 else 0,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=run.device == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps",
        # By the training itself: transformers takes an encoder that it has evaluated before for one that is wrapped
        # already, and would not add up its gradients over several processes.
        eval_on_start=eval_on_start,
        eval_steps=settings.eval_steps or max(1, run.steps // EVALUATIONS),
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen
        # Buffers (masks, positions) are equal on all ranks and stay so; written anew at every pass, they would spoil
        # the gradients of the one before where columns are embedded one by one.
        ddp_broadcast_buffers=False,
        save_strategy="no",  # by Course
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        **more,
    )
