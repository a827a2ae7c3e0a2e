"""Steps of whole runs that train a static table at six lengths, each kind of run in a process of its own:

trainer       sentence-transformers' trainer and MatryoshkaLoss(MultipleNegativesRankingLoss), fused AdamW, its
              collator, which tokenises every batch, memory as glibc hands it out
pycse         what `pycse train --static` does: tokens once, batches by index, freed memory kept, fused AdamW
pycse half    the same with --bf16

The text is the default one in pairs that share no sentence, so that equal texts, which theirs does not look for, make
no difference. The losses of one batch are compared first.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Timing, in_new_process
from pycse.training.data import Text, default_text
from pycse.training.settings import Settings

WIDTH, LENGTHS = 1024, (1024, 512, 256, 128, 64, 32)
STEPS, WARM = 9, 3  # steps that are timed, and those before
LR = 0.2
ALLOWED, ALLOWED_HALF = 1e-4, 2e-2  # relative


def pairs() -> Text:
    sentences = [sentence for (sentence,) in default_text().rows]
    return Text("pairs of the default text", list(zip(sentences[::2], sentences[1::2])), Counter())


def start_of(half: bool = False, seed: int = Settings.seed) -> tuple[Settings, Any]:
    """The settings of a run, and what it begins with."""
    from pycse.training.names import bundled_model
    from pycse.training.static.table import start

    settings = Settings(static=WIDTH, lr=LR, bf16=half, seed=seed)
    return settings, start(settings, bundled_model(), "bundled", "cpu")


def theirs(model: Any) -> Any:
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    return MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=20.0), LENGTHS)


def ours(half: bool, folder: str) -> tuple[Any, Any, Any, Any]:
    """Model, tokens, loss and optimizer."""
    from pycse.training.static.fit import optimizer_of
    from pycse.training.static.loss import StaticLoss
    from pycse.training.static.tokens import tokenise

    settings, start = start_of(half)
    tokens = tokenise(pairs(), start.tokenizer, settings.max_length, folder)
    return start.model, tokens, StaticLoss(settings), optimizer_of(start.model, settings)


def agree(B: int) -> None:
    from pycse.training.static.fit import train_step

    rows, text, values = np.arange(B), pairs(), []
    with tempfile.TemporaryDirectory() as folder:
        for half in (False, True):
            model, tokens, loss, optimizer = ours(half, folder)
            values.append(train_step(model, tokens, rows, loss, optimizer))
    _, start = start_of()
    columns = [start.model.preprocess([text.rows[i][k] for i in rows]) for k in (0, 1)]
    with torch.no_grad():
        expected = theirs(start.model)(columns, None).item()
    for value, allowed in zip(values, (ALLOWED, ALLOWED_HALF)):
        if not abs(value - expected) <= allowed * abs(expected):
            raise AssertionError(f"our loss is {value}, theirs {expected}")


def trainer_steps(B: int) -> list[float]:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers.trainer_callback import PrinterCallback, TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

    _, start = start_of()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=STEPS + WARM, per_device_train_batch_size=B, dataloader_drop_last=True,
            learning_rate=LR, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=start.model, args=arguments, train_dataset=pairs().dataset(), loss=theirs(start.model),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return list(np.diff(ends)[WARM - 1 :])


def our_steps(B: int, half: bool) -> list[float]:
    from pycse.training.static.fit import train_step
    from pycse.training.static.memory import keep_freed_memory
    from pycse.training.static.tokens import batches

    keep_freed_memory()
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        model, tokens, loss, optimizer = ours(half, folder)
        order = batches(len(tokens.index), B, seed=0)
        for _ in range(STEPS + WARM):
            started = time.perf_counter()
            train_step(model, tokens, next(order), loss, optimizer)
            taken.append(time.perf_counter() - started)
    return taken[WARM:]


def whole(B: int) -> dict[str, Timing]:
    """Medians of steps, each kind of run twice in turn, so that a machine that slows down is seen by all."""
    agree(min(B, 1024))
    found: dict[str, list[float]] = {"trainer": [], "pycse": [], "pycse half": []}
    for _ in range(2):
        found["trainer"] += in_new_process(trainer_steps, B)
        found["pycse"] += in_new_process(our_steps, B, False)
        found["pycse half"] += in_new_process(our_steps, B, True)
    return {name: Timing([statistics.median(seconds)]) for name, seconds in found.items()}
