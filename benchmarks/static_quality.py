"""A static table after a training with ours and with sentence-transformers' trainer: scores, not times.

ours       `pycse train --static`: the loss at six lengths, tokens once, batches by index
steps      their trainer and MatryoshkaLoss(MultipleNegativesRankingLoss), for as many steps
time       the same, for as many steps as ours takes the time of

One text, batch size, rate, schedule and start (a seed's) for all; each run is a process of its own. A run of "time"
has the steps that fit by the time of a step of the run before it, and says the seconds that it took.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

from rich.table import Table

from benchmarks.measure import in_new_process
from benchmarks.static import LENGTHS, LR, pairs, start_of, theirs
from pycse.training.settings import Settings

BATCH, WARMUP = 2048, Settings.warmup
Scores = dict[str, dict[int, float]]  # Spearman of a set at a length


def judged(model: Any, eval_files: tuple[str, ...]) -> Scores:
    from pycse.training.eval_sets import evaluation_sets
    from pycse.training.static.fit import scores_by_length

    sets = evaluation_sets(eval_files)
    found = scores_by_length(model.eval(), sets, LENGTHS)
    return {s.name: {length: found[length][s.name]["spearman"] for length in LENGTHS} for s in sets}


def ours(seed: int, steps: int, eval_files: tuple[str, ...]) -> tuple[float, Scores]:
    """Seconds, tokenising included, and scores."""
    from pycse.training.static.fit import factor, optimizer_of, train_step
    from pycse.training.static.loss import StaticLoss
    from pycse.training.static.memory import keep_freed_memory
    from pycse.training.static.tokens import batches, tokenise

    settings, start = start_of(seed=seed)
    text, model = pairs(), start.model
    keep_freed_memory()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenise(text, start.tokenizer, settings.max_length, folder)
        loss, optimizer = StaticLoss(settings), optimizer_of(model, settings)
        order = batches(len(tokens.index), BATCH, seed)
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LR * factor(step, steps, WARMUP)
            train_step(model, tokens, next(order), loss, optimizer)
    return time.perf_counter() - begun, judged(model, eval_files)


def trainer(seed: int, steps: int, eval_files: tuple[str, ...]) -> tuple[float, Scores]:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers.trainer_callback import PrinterCallback

    _, start = start_of(seed=seed)
    model, text = start.model, pairs().dataset()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, dataloader_drop_last=True,
            learning_rate=LR, warmup_steps=round(WARMUP * steps), use_cpu=True, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_strategy="no", seed=seed,
        )  # fmt: skip
        one = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=text, loss=theirs(model))
        one.remove_callback(PrinterCallback)
        begun = time.perf_counter()
        one.train()
        seconds = time.perf_counter() - begun
    return seconds, judged(model, eval_files)


def table(seeds: int, steps: int, eval_files: tuple[str, ...], say: Any) -> Table:
    runs: dict[str, list[tuple[int, float, Scores]]] = {"ours": [], "steps": [], "time": []}
    for seed in range(1, seeds + 1):
        taken, scores = in_new_process(ours, seed, steps, eval_files)
        runs["ours"].append((steps, taken, scores))
        longer, scores = in_new_process(trainer, seed, steps, eval_files)
        runs["steps"].append((steps, longer, scores))
        fewer = max(1, round(steps * taken / longer))
        seconds, scores = in_new_process(trainer, seed, fewer, eval_files)
        runs["time"].append((fewer, seconds, scores))
        say(
            f"seed {seed}: "
            + ", ".join(f"{name} {found[-1][0]} steps {found[-1][1]:.0f} s" for name, found in runs.items())
        )
    out = Table(
        title=f"a table of {LENGTHS[0]} features, batches of {BATCH}: Spearman, mean and deviation of {seeds} seeds"
    )
    for name in ("run", "steps", "s", "set", *(str(length) for length in LENGTHS)):
        out.add_column(name)
    for name, found in runs.items():
        for k, of in enumerate(found[0][2]):
            cells = []
            for length in LENGTHS:
                values = [scores[of][length] for _, _, scores in found]
                spread = f" ± {statistics.stdev(values):.4f}" if seeds > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread}")
            first = (
                name,
                f"{statistics.mean(n for n, _, _ in found):.0f}",
                f"{statistics.mean(s for _, s, _ in found):.0f}",
            )
            out.add_row(*(first if k == 0 else ("", "", "")), of, *cells)
    return out
