"""Training a static table: batches by index, one pass over the table's gradient, AdamW.

AdamW on the whole table, in PyTorch's fused form, and not a sparse optimizer: a batch of 2048 pairs has about 12,000 of
30,522 tokens, whose rows lie apart. Measured for 17,000 (1024 wide, 2 threads, AVX2): fused AdamW 35 ms, SparseAdam
278, Adam on gathered rows 174 (docs/training.md).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pycse.training import signals
from pycse.training.checkpoints import Checkpoints, guarded
from pycse.training.choices import EVALUATIONS, STATIC_EVAL_BATCH_SIZE
from pycse.training.encoder import load_encoder
from pycse.training.errors import Failed
from pycse.training.eval_sets import ScoredPairs
from pycse.training.evaluate import Embedded, Scores, evaluate
from pycse.training.fit import in_words, judge_of, rescued
from pycse.training.folder import staged
from pycse.training.progress import say, shown
from pycse.training.run import Run
from pycse.training.saving import write
from pycse.training.settings import Settings
from pycse.training.signals import Interrupted
from pycse.training.static.bags import mean_of_rows
from pycse.training.static.loss import StaticLoss
from pycse.training.static.table import bag
from pycse.training.static.tokens import KeptTeacher, Tokens, batches

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KNOWN = "run.json"  # of a checkpoint: what the run has found out


class NotFinite(ArithmeticError):
    """Of a loss, before the step that it would spoil."""


def scores_by_length(
    model: SentenceTransformer,
    sets: list[ScoredPairs],
    lengths: Sequence[int],
    batch_size: int = STATIC_EVAL_BATCH_SIZE,
) -> dict[int, Scores]:
    """Scores of the first features of the embeddings."""
    found: dict[int, Scores] = {}
    for length in lengths:
        with model.truncate_embeddings(length):
            found[length] = evaluate(model, sets, batch_size)
    return found


def optimizer_of(model: SentenceTransformer, settings: Settings) -> torch.optim.Optimizer:
    fused = model.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused
    )


def factor(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate at a step, counted from 0: it rises to 1 over a share of the steps, then falls to 0."""
    rising = warmup * steps
    return (step + 1) / rising if step + 1 < rising else (steps - step) / (steps - max(rising - 1, 0))


def train_step(
    model: SentenceTransformer,
    tokens: Tokens,
    rows,
    loss: StaticLoss,
    optimizer: torch.optim.Optimizer,
    teachers: Sequence[KeptTeacher] = (),
) -> float:
    """One step on the rows of these numbers; their loss before it."""
    numbers = tokens.index[rows]  # (B, columns)
    ids, offsets = tokens.bags(numbers.T.reshape(-1), model.device)
    columns = mean_of_rows(bag(model).weight, ids, offsets).split(len(rows))
    learned = [teacher(numbers[:, 0]).to(model.device) for teacher in teachers]
    value = loss(columns, [tokens.hashes[column] for column in numbers.T], learned)
    if not math.isfinite(found := value.item()):
        raise NotFinite(f"the loss is {found:g}")
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return found


class Training:
    """The state of a table's training: all that a checkpoint holds.

    Fields:
        step: steps done.
        best: (step, Spearman) of the best evaluation, with --keep best.
        since: evaluations after it.
    """

    def __init__(self, run: Run, model: SentenceTransformer, loss: StaticLoss, optimizer: torch.optim.Optimizer):
        self.run, self.model, self.loss, self.optimizer = run, model, loss, optimizer
        self.step, self.since, self.seconds, self.stepping = 0, 0, 0.0, 0.0
        self.best: tuple[int, float] | None = None

    def save(self, checkpoints: Checkpoints) -> None:
        run, static = self.run, self.run.static
        assert static is not None
        checkpoints.begin()
        checkpoints.stage()
        write(self.model, checkpoints.staging / "model")
        state = {
            "table": bag(self.model).weight.detach(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.loss.generator.get_state(),
        }
        torch.save(state, checkpoints.staging / "state.pt")
        known = {
            "step": self.step, "best": self.best, "since": self.since, "seconds": self.seconds,
            "stepping": self.stepping, "loss": run.loss, "rates": run.rates, "parts": run.parts, "scores": run.scores,
            "before": static.before, "similarities": run.similarities,
        }  # fmt: skip
        (checkpoints.staging / KNOWN).write_text(json.dumps(known), encoding="utf-8")
        checkpoints.take("", self.step)

    def take_up(self, checkpoint: Path) -> None:
        run, static = self.run, self.run.static
        assert static is not None
        state = torch.load(checkpoint / "state.pt", map_location=self.model.device, weights_only=True)
        with torch.no_grad():
            bag(self.model).weight.copy_(state["table"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.generator.set_state(state["generator"].cpu())
        known = json.loads((checkpoint / KNOWN).read_text(encoding="utf-8"))
        self.step, self.since = known["step"], known["since"]
        self.seconds, self.stepping = known["seconds"], known["stepping"]
        self.best = tuple(known["best"]) if known["best"] else None
        run.parts, run.similarities = known["parts"], known["similarities"]
        run.loss = [(step, value) for step, value in known["loss"]]
        run.rates = [(rate, length) for rate, length in known["rates"]]
        run.scores = [(step, scores) for step, scores in known["scores"]]
        static.before = {int(length): scores for length, scores in known["before"].items()}

    def judged(self, scores: Scores, judge: str, checkpoints: Checkpoints, guarded: Callable[..., bool]) -> bool:
        """Take in an evaluation; whether the training is to stop for want of a better one."""
        settings, score = self.run.settings, scores[judge]["spearman"]
        if settings.keep != "best":
            return False
        if math.isfinite(score) and (self.best is None or score > self.best[1]):

            def save_best() -> None:
                with staged(checkpoints.best(self.step)) as stage:
                    write(self.model, stage)

            if guarded(save_best):
                self.best, self.since = (self.step, score), 0
            return False
        self.since += 1
        return self.spent()

    def spent(self) -> bool:
        """Whether there have been --patience evaluations without a better one."""
        patience = self.run.settings.patience
        return patience is not None and self.since >= patience

    def stop(self) -> None:
        """End before the last step."""
        run = self.run
        run.stopped = f"after step {self.step} of {run.steps}: {run.settings.patience} evaluations without a better one"
        run.steps = self.step


def best_of(checkpoint: Path) -> int | None:
    """Step of the best evaluation that a checkpoint knows of."""
    best = json.loads((checkpoint / KNOWN).read_text(encoding="utf-8"))["best"]
    return None if best is None else int(best[0])


def fit(
    run: Run,
    model: SentenceTransformer,
    tokens: Tokens,
    teachers: Sequence[KeptTeacher],
    sets: list[ScoredPairs],
    out: Path,
    console,
) -> None:
    """Evaluate, train and evaluate again, from the latest checkpoint where there is one; fills in the results of the
    run.

    Raises:
        Interrupted, Failed: as pycse.training.fit.fit.
    """
    settings, static = run.settings, run.static
    assert static is not None
    loss, optimizer = StaticLoss(settings), optimizer_of(model, settings)
    every = settings.eval_steps or max(1, run.steps // EVALUATIONS)
    size = settings.eval_batch_size
    checkpoints = Checkpoints(out / "checkpoints", "train", settings.save_steps, best_of)
    training = Training(run, model, loss, optimizer)
    if (latest := checkpoints.latest()) is not None:
        training.take_up(latest)
        if training.spent() and training.step < run.steps:
            training.stop()
        console.print(f"going on after step {training.step}")
    else:
        static.before = scores_by_length(model, sets, settings.lengths, size)
        run.similarities["before"] = Embedded(model, sets[:1], size).histogram(sets[0])
        run.scores = [(0, static.before[static.width])]
    run.before = static.before[static.width]
    shown_set, judge = sets[0].name, judge_of(settings, [pairs.name for pairs in sets])
    order = batches(len(tokens.index), settings.batch_size, settings.seed)
    for _ in range(training.step):
        next(order)
    saved = True
    with shown(console, run.steps, settings.batch_size, training.step) as progress:
        started, earlier = time.perf_counter(), training.seconds
        model.train()
        while training.step < run.steps and not signals.caught():
            rate = settings.learning_rate * factor(training.step, run.steps, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            before = time.perf_counter()
            try:
                value = train_step(model, tokens, next(order), loss, optimizer, teachers)
            except NotFinite as error:
                raise Failed(
                    f"step {training.step + 1}: {error}, at a learning rate of {rate:g}. Try a lower --lr or a higher "
                    f"--temperature. {rescued(model, out)}"
                ) from None
            training.stepping += time.perf_counter() - before
            run.step_ends.append(time.perf_counter())
            training.step += 1
            run.loss.append((training.step, value))
            for name, part in loss.parts.items():
                run.parts.setdefault(name, []).append(part)
            progress.update(training.step, loss=f"loss {value:.4f}")
            stop = False
            if training.step % every == 0 and training.step < run.steps:
                scores = scores_by_length(model, sets, [static.width], size)[static.width]
                run.scores.append((training.step, scores))
                progress.update(training.step, score=f"{shown_set} {scores[shown_set]['spearman']:.4f}")
                stop = training.judged(scores, judge, checkpoints, lambda save: guarded(save, console))
            training.seconds = earlier + time.perf_counter() - started
            if checkpoints.due(training.step) or signals.caught():
                saved = guarded(lambda: training.save(checkpoints), console)
                checkpoints.drop()
            if stop:
                training.stop()
        number = signals.caught() if training.step < run.steps else 0
        if number and checkpoints.latest() != checkpoints.name(training.step):  # it came after the step was looked at
            saved = guarded(lambda: training.save(checkpoints), console)
    if number:
        raise Interrupted(number, in_words(saved, training.step, out, settings))
    run.seconds["train"], run.seconds["steps"], run.earlier = training.seconds, training.stepping, earlier
    if not run.scores or run.scores[-1][0] != run.steps:
        scores = scores_by_length(model, sets, [static.width], size)[static.width]
        run.scores.append((run.steps, scores))
        training.judged(scores, judge, checkpoints, lambda save: guarded(save, console))
    if training.best is not None:
        run.kept = training.best[0]
        if run.kept != run.steps and not checkpoints.best(run.kept).is_dir():
            say(console, f"{checkpoints.best(run.kept)} has gone; the last weights are kept", style="red")
            run.kept = run.steps
        elif run.kept != run.steps:
            saved_best = load_encoder(str(checkpoints.best(run.kept)), "cpu")
            with torch.no_grad():
                bag(model).weight.copy_(bag(saved_best).weight)
    run.similarities["after"] = Embedded(model, sets[:1], size).histogram(sets[0])
    static.after = scores_by_length(model, sets, settings.lengths, size)
    run.after = static.after[static.width]
