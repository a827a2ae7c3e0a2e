"""sentence-transformers' trainer as a run needs it: checkpoints that are whole or absent, a loss that stays finite,
signals between two steps, the best weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from pycse.training import ranks, signals
from pycse.training.checkpoints import Checkpoints, guarded
from pycse.training.encoder import load_encoder
from pycse.training.errors import Failed
from pycse.training.evaluate import metric
from pycse.training.folder import staged
from pycse.training.heads import without_head
from pycse.training.run import Run
from pycse.training.saving import write

PARTS = ("contrastive", "distillation")
HEAD = "head.safetensors"  # of a checkpoint


class Course(TrainerCallback, ExportableState):
    """Follows a training step by step; its own state goes into each checkpoint.

    Args:
        run: gets the parts of a distillation's loss.
        checkpoints: of this phase.
        loss: the loss module.
        progress: of progress.shown.
        evaluation: the evaluator, which keeps the similarities of the first set.
        shown, judge: evaluation sets: whose score is shown, and which decides what is best.
        console: for warnings.
    """

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        loss: Any,
        progress: Any,
        evaluation: Any,
        shown: str,
        judge: str,
        console: Any,
    ):
        self.run, self.checkpoints, self.loss, self.progress = run, checkpoints, loss, progress
        self.evaluation = evaluation
        self.shown, self.judge, self.console = shown, judge, console
        self.best: list[float] | None = None  # [step, Spearman]
        self.since = 0  # evaluations without a better one
        self.complete = False
        self.before = 0.0  # seconds of earlier parts of the run
        self.started = time.perf_counter()
        self.losses: list[torch.Tensor] = []  # of the batches of this step
        self.latest: list[Any] = []  # and their parts
        self.signal, self.due = 0, False
        self.saved = True  # whether the latest checkpoint could be written

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        own = {"parts": self.run.parts, "best": self.best, "since": self.since, "complete": self.complete}
        more = {"similarities": self.run.similarities, "seconds": self.seconds}
        return {"args": {}, "attributes": {**own, **more}}

    def restore(self, saved: dict[str, Any]) -> None:
        found = saved["Course"]["attributes"]
        self.run.parts = {name: list(values) for name, values in found["parts"].items()}
        self.run.similarities = found["similarities"]
        self.best, self.since, self.complete = found["best"], found["since"], found["complete"]
        self.before = found["seconds"]

    def on_train_begin(self, args, state, control, **_):
        if state.global_step > 0:
            self.restore(state.stateful_callbacks)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        """Stop before weights are spoilt; and agree, where there are several ranks, on what comes after the step."""
        step = state.global_step + 1
        fine = all(math.isfinite(loss.item()) for loss in self.losses) and gradients_are_finite(model)
        bad, number, due = ranks.largest(
            [float(not fine), float(signals.caught()), float(self.checkpoints.due(step))], args.device
        )
        if bad:
            raise not_finite(step, self.losses, optimizer)
        self.losses, self.signal, self.due = [], int(number), bool(due)

    def on_step_end(self, args, state, control, **_):
        for name in PARTS if self.latest else ():
            values = [float(getattr(parts, name)) for parts in self.latest]
            self.run.parts.setdefault(name, []).append(sum(values) / len(values))
        self.latest = []
        self.run.step_ends.append(time.perf_counter())
        control.should_save = control.should_save or self.due or self.signal > 0
        if self.signal:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.progress.update(state.global_step, loss=f"loss {float(logs['loss']):.4f}")

    def on_evaluate(self, args, state, control, metrics=None, model=None, **_):
        metrics = metrics or {}
        value = metrics.get(metric(self.shown, "spearman", "eval_"))
        if value is not None:
            self.progress.update(state.global_step, score=f"{self.shown} {value:.4f}")
        settings, seen = self.run.settings, self.run.similarities
        seen.setdefault("before", self.evaluation.histogram)
        if settings.keep != "best":
            seen["after"] = self.evaluation.histogram
        if settings.keep != "best" or state.global_step == 0:
            return
        score = ranks.of_first(float(metrics[metric(self.judge, "spearman", "eval_")]))
        if math.isfinite(score) and (self.best is None or score > self.best[1]):
            encoder = getattr(self.loss, "model", model)
            written = ranks.first() and guarded(lambda: self.save_best(encoder, state.global_step), self.console)
            if ranks.of_first(written):
                self.best, self.since, seen["after"] = [state.global_step, score], 0, self.evaluation.histogram
            return
        self.since += 1
        if settings.patience is not None and self.since >= settings.patience:
            control.should_training_stop = True

    def save_best(self, encoder: Any, step: int) -> None:
        with staged(self.checkpoints.best(step)) as stage, without_head(unwrapped(encoder)):
            write(unwrapped(encoder), stage)


class RunTrainer(SentenceTransformerTrainer):
    """The library's trainer for one phase of a run."""

    def __init__(self, *args: Any, course: Course, **options: Any):
        self.course, self.stage = course, ""
        super().__init__(*args, **options)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The card is ours (model_card.py): theirs measures and quotes the training text."""

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*args, **options)
        self.course.losses.append(loss)
        if getattr(self.course.loss, "latest", None) is not None:
            self.course.latest.append(self.course.loss.latest)
        return loss

    def _get_output_dir(self, trial: Any) -> str:
        return self.stage

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """A checkpoint of all ranks, written under another name; rank 0 gives it its own."""
        course, checkpoints, step = self.course, self.course.checkpoints, self.state.global_step
        checkpoints.begin()
        course.run.parts = ranks.mean(course.run.parts)  # of all ranks, as what they find here when they go on
        made = ranks.first() and guarded(checkpoints.stage, course.console)
        where = ranks.of_first(str(checkpoints.staging) if made else None)
        written = where is not None
        if written:
            self.stage = where
            written = guarded(lambda: super(RunTrainer, self)._save_checkpoint(model, trial), course.console)
        course.saved = all(ranks.exchange(written))
        if ranks.first():
            if course.saved:
                course.saved = guarded(lambda: checkpoints.take(f"checkpoint-{step}", step), course.console)
            checkpoints.drop()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A model that loads, and beside it the head that it has in training alone."""
        with without_head(self.model) as head:
            write(self.model, Path(str(output_dir)))
        if head is not None:
            save_file(head.state_dict(), Path(str(output_dir)) / HEAD)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        put_weights(self.model, Path(checkpoint_path))


def put_weights(encoder: Any, folder: Path) -> None:
    """Give an encoder the weights, and the masks, that were saved of it."""
    with without_head(encoder) as head:
        saved = load_encoder(str(folder), "cpu", trust_remote_code=encoder.trust_remote_code)
        encoder.load_state_dict(saved.state_dict())
    if head is not None and (folder / HEAD).exists():
        head.load_state_dict(load_file(folder / HEAD))


def unwrapped(encoder: Any) -> Any:
    """The encoder within the trainer's wrapper."""
    return getattr(encoder, "module", encoder)


def gradients_are_finite(model: Any) -> bool:
    gradients: Iterable[torch.Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch._foreach_norm(list(gradients)) if gradients else []
    return not norms or bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def not_finite(step: int, losses: list[torch.Tensor], optimizer: Any) -> Failed:
    values = ", ".join(f"{loss.item():g}" for loss in losses)
    rate = max((group["lr"] for group in optimizer.param_groups), default=0.0) if optimizer is not None else 0.0
    what = (
        f"the loss is {values}" if any(not math.isfinite(one.item()) for one in losses) else "a gradient is not finite"
    )
    return Failed(
        f"step {step}: {what}, at a learning rate of {rate:g}. Try a lower --lr, a longer --warmup, a higher "
        "--temperature, or full precision instead of --bf16"
    )
