"""Removing parameters: `pycse sparsify`, and the second half of the recipes that prune."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pycse.sparse import Report, score, sparsify
from pycse.sparse.sparsify import count_parameters
from pycse.training import ranks
from pycse.training.checkpoints import guarded
from pycse.training.choices import n_of_m
from pycse.training.data import Text
from pycse.training.encoder import check_for_training, keep_layers, load_encoder, loading_options
from pycse.training.errors import UserError
from pycse.training.eval_sets import ScoredPairs
from pycse.training.evaluate import Scores, evaluate
from pycse.training.fit import fit
from pycse.training.folder import Folder
from pycse.training.loss import build_loss, check_loss
from pycse.training.prepare import keep_prompts, load_all_teachers, model_name, prepare, take_prompt
from pycse.training.report import end, recorded, text_table
from pycse.training.resume import check_same_data, run_folder
from pycse.training.run import Pruned, Run
from pycse.training.saving import save_model
from pycse.training.saving import write as write_model
from pycse.training.settings import Settings
from pycse.training.teachers import described

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TIMED = 128  # sentences of the text that the speed is measured on
ROUNDS = 5


def arguments(settings: Settings) -> dict[str, Any]:
    """The settings in the words of pycse.sparse.sparsify."""
    chosen = settings.pruning()
    kind = chosen["granularity"]
    numbers = n_of_m(kind)
    values = {"sparsity": chosen["sparsity"], "granularity": kind, "scope": chosen["scope"], "block": chosen["block"]}
    return values if numbers is None else values | {"granularity": "n:m", "n": numbers[0], "m": numbers[1]}


def by_dropout(settings: Settings, text: Text) -> bool:
    """Whether positives for the scores are made by dropout: always, but for a user's pairs.

    A neighbouring sentence is a positive to learn from, not one that an encoder should already be near to.
    """
    return text.by_dropout or settings.positives_of_sentences == "next"


def check_prunable(settings: Settings, encoder: SentenceTransformer, text: Text) -> None:
    """Raise UserError where scoring or removing would fail, before any work: the removal is tried on a copy."""
    if by_dropout(settings, text) and not any(isinstance(m, nn.Dropout) and m.p > 0 for m in encoder.modules()):
        raise UserError("this model has no dropout, so alignment cannot be scored; give pairs in --train-file")
    trial = copy.deepcopy(encoder)
    try:
        sparsify(trial, {name: p.detach().abs() for name, p in trial.named_parameters()}, **arguments(settings))
    except (ValueError, TypeError) as error:
        raise UserError(f"--granularity {settings.pruning()['granularity']}: {error}") from error


def batches(settings: Settings, text: Text) -> list[Any]:
    """Batches to score on, drawn from the text: sentences, or pairs of them, with their prompts."""
    rows, size = text.rows, settings.batch_size
    query, document = (prompt or "" for prompt in settings.prompts)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    order = torch.randperm(len(rows), generator=generator, dtype=torch.int64, device="cpu").tolist()
    count = min(settings.pruning()["score_batches"], len(rows) // size)
    drawn = [[rows[i] for i in order[k * size : (k + 1) * size]] for k in range(count)]
    if by_dropout(settings, text):
        return [[query + row[0] for row in batch] for batch in drawn]
    return [([query + row[0] for row in batch], [document + row[1] for row in batch]) for batch in drawn]


def remove(settings: Settings, encoder: SentenceTransformer, text: Text) -> Report:
    """Score the encoder's parameters on the text and remove those that the settings say.

    Every rank scores, on the same batches, and takes rank 0's scores, since processors differ in rounding: the masks
    are equal.
    """
    chosen = settings.pruning()
    own_length = encoder.max_seq_length
    encoder.max_seq_length = settings.max_length
    try:
        with ranks.together(), of_the_user():
            scores = score(encoder, batches(settings, text), chosen["balance"], chosen["means"], seed=settings.seed)
        ranks.take_from_first(scores)
        with of_the_user():
            return sparsify(encoder, scores, **arguments(settings))
    finally:
        encoder.max_seq_length = own_length


@contextmanager
def of_the_user() -> Iterator[None]:
    """What the library refuses, the user can put right."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def tuning_steps(settings: Settings, trained: int) -> int:
    """Steps after the removal: half of those before, where they are not given."""
    steps = settings.pruning()["finetune_steps"]
    return trained // 2 if steps is None else steps


def tune(
    later: Run,
    encoder: SentenceTransformer,
    dense: SentenceTransformer,
    report: Report,
    scores: Scores,
    loss: Any,
    sets: list[ScoredPairs],
    folder: Folder,
    console: Any,
) -> Pruned:
    """Train what is left for the steps of the run ``later`` and measure. The encoder keeps its length limit.

    Args:
        dense, scores: the encoder before the removal, and its scores.
    """
    own_length = encoder.max_seq_length
    console.print(report.table())
    if later.steps:
        fit(later, encoder, loss, sets, folder.path, console, "finetune")
        encoder.max_seq_length = own_length
        pruned = Pruned(report, scores, later.before, later.after)
    else:
        settings = later.settings
        found = evaluate(encoder, sets, settings.eval_batch_size, prompts=settings.prompts)
        pruned = Pruned(report, scores, found)
    if ranks.first():
        sentences = [row[0] for row in later.text.rows[:TIMED]]

        def measure() -> None:
            pruned.size = sizes({"before": dense, "after": encoder}, sentences, folder.work)

        guarded(measure, console, "sizes could not be measured")
    return pruned


def sizes(encoders: dict[str, SentenceTransformer], sentences: list[str], scratch: Path) -> dict[str, dict[str, float]]:
    """Parameters, weights on disk and speed; the encoders take turns at the sentences, and the fastest round counts."""
    result: dict[str, dict[str, float]] = {}
    for name, encoder in encoders.items():
        parameters, nonzero = count_parameters(encoder)
        folder = scratch / f"size-{name}"
        write_model(encoder, folder)
        weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        result[name] = {"parameters": parameters, "nonzero": nonzero, "megabytes": weights / 1e6}
    for name, rate in speeds(
        {name: encoding(one, sentences) for name, one in encoders.items()}, len(sentences)
    ).items():
        result[name]["sentences_a_second"] = rate
    return result


def encoding(encoder: SentenceTransformer, sentences: list[str]) -> Callable[[], object]:
    return lambda: encoder.encode(sentences, batch_size=32, show_progress_bar=False)


def speeds(calls: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """``count`` over the fastest of some interleaved rounds of each call."""
    best: dict[str, float] = {}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken = time.perf_counter() - started
            best[name] = min(taken, best.get(name, taken))
    return {name: count / taken for name, taken in best.items()}


def sparsify_run(settings: Settings, console: Any) -> tuple[Run, Path]:
    """What `pycse sparsify` does: (Run with its `pruned` filled in, the folder that it wrote to).

    Raises:
        UserError: for input that cannot be used; nothing has been written then.
    """
    from transformers import set_seed

    started = time.perf_counter()
    with ranks.together():
        out, sets, text, model, _ = prepare(settings, "sparsify")
        check_same_data(settings, text, sets, console)
        set_seed(settings.seed)
        encoder = load_encoder(model, ranks.device(settings.device), **loading_options(settings, training=True))
        take_prompt(settings, encoder)
        steps = settings.pruning()["finetune_steps"] or 0
        check_for_training(encoder, bool(steps) and text.by_dropout, settings.max_length)
        check_prunable(settings, encoder, text)
        shown = model_name(settings)
        loss, teachers = None, []
        if steps:
            check_loss(settings, encoder.device)
            teachers = load_all_teachers(settings, encoder, model, f"{shown}, before the removal")
            loss = build_loss(settings, encoder, teachers)
        layers = list(range(keep_layers(encoder, None)))
    ranks.join(encoder.device)
    run = Run(
        settings=settings,
        text=text,
        model=shown,
        layers=layers,
        layers_before=len(layers),
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        device=str(encoder.device),
        steps=steps,
        processes=ranks.size(),
    )
    console.print(text_table(text, sets))
    with run_folder(settings, out, text, sets) as folder:
        with recorded(run, folder.path):
            scores = evaluate(encoder, sets, settings.eval_batch_size, prompts=settings.prompts)
            dense = copy.deepcopy(encoder)
            report = remove(settings, encoder, text)
            run.pruned = tune(run, encoder, dense, report, scores, loss, sets, folder, console)
        run.before, run.after = scores, run.pruned.final
        run.teachers = described(teachers)
        keep_prompts(encoder, settings)
        with ranks.together():
            if ranks.first():
                end(run, folder, lambda stage: save_model(encoder, stage, settings, run), started)
    return run, folder.path
