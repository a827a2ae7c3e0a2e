"""Training a static table: batches by index, one pass over the table's gradient, AdamW.

AdamW on the whole table, in PyTorch's fused form, and not a sparse optimizer: a batch of 2048 pairs has about 12,000 of
30,522 tokens, whose rows lie apart. Measured for 17,000 (1024 wide, 2 threads, AVX2): fused AdamW 35 ms, SparseAdam
278, Adam on gathered rows 174 (docs/training.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pycse.training.choices import EVALUATIONS
from pycse.training.evaluate import ScoredPairs, Scores, by_set, evaluators
from pycse.training.fit import progress_bar
from pycse.training.run import Run
from pycse.training.settings import Settings
from pycse.training.static.bags import mean_of_rows
from pycse.training.static.loss import StaticLoss
from pycse.training.static.table import bag
from pycse.training.static.tokens import KeptTeacher, Tokens, batches

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EVALUATION_BATCH = 512  # texts embedded at a time


def scores_by_length(model: SentenceTransformer, sets: list[ScoredPairs], lengths: Sequence[int]) -> dict[int, Scores]:
    """Scores of the first features of the embeddings."""
    judges = evaluators(sets, EVALUATION_BATCH)
    names = [pairs.name for pairs in sets]
    found: dict[int, Scores] = {}
    for length in lengths:
        metrics: dict[str, float] = {}
        with model.truncate_embeddings(length):
            for judge in judges:
                metrics |= judge(model)
        found[length] = by_set(metrics, names)
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
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


def fit(
    run: Run,
    model: SentenceTransformer,
    tokens: Tokens,
    teachers: Sequence[KeptTeacher],
    sets: list[ScoredPairs],
    console,
) -> None:
    """Evaluate, train and evaluate again; fills in the results of the run."""
    settings, static = run.settings, run.static
    assert static is not None
    loss, optimizer = StaticLoss(settings), optimizer_of(model, settings)
    every = settings.eval_steps or max(1, run.steps // EVALUATIONS)
    static.before = scores_by_length(model, sets, settings.lengths)
    run.before = static.before[static.width]
    run.scores = [(0, run.before)]
    shown = sets[0].name
    order = batches(len(tokens.index), settings.batch_size, settings.seed)
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=run.steps, loss="", score="")
        started = time.perf_counter()
        stepping = 0.0
        model.train()
        for step in range(run.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor(step, run.steps, settings.warmup)
            before = time.perf_counter()
            value = train_step(model, tokens, next(order), loss, optimizer, teachers)
            stepping += time.perf_counter() - before
            run.loss.append((step + 1, value))
            for name, part in loss.parts.items():
                run.parts.setdefault(name, []).append(part)
            progress.update(task, completed=step + 1, loss=f"loss {value:.4f}")
            if (step + 1) % every == 0 and step + 1 < run.steps:
                scores = scores_by_length(model, sets, [static.width])[static.width]
                run.scores.append((step + 1, scores))
                progress.update(task, score=f"{shown} {scores[shown]['spearman']:.4f}")
        run.seconds["train"] = time.perf_counter() - started
        run.seconds["steps"] = stepping
    static.after = scores_by_length(model, sets, settings.lengths)
    run.after = static.after[static.width]
    run.scores.append((run.steps, run.after))
