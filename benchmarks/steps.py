"""Training steps with sentence-transformers: pycse's losses beside its own, in turns, in one process.

static     a StaticEmbedding of 30522 x 1024: embeddings, loss, backward and AdamW, on texts of 20 tokens
lengths    the same at six lengths: MatryoshkaLoss around theirs, dims= of ours
whole      steps of whole runs at six lengths (benchmarks/static.py): their trainer, and `pycse train --static`
cached     the loss of a cached batch and its backward, without the encoder's passes: B = 4096, D = 384, 64 at a time
equal      how much of a step the search for equal texts takes
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Timing, in_new_process, interleaved, peak_memory
from benchmarks.static import LENGTHS, whole

VOCABULARY, WIDTH, TOKENS = 30522, 1024, 20
CACHED_ROWS, CACHED_WIDTH, MINI = 4096, 384, 64
ALLOWED = 1e-4  # relative, of losses before the first step


def static_model() -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    words = Tokenizer(WordLevel({str(k): k for k in range(VOCABULARY)}, unk_token="0"))
    return SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=WIDTH)], device="cpu")


def columns(B: int) -> list[dict[str, Tensor]]:
    """Anchors and positives that share half of their tokens."""
    g = torch.Generator().manual_seed(1)
    anchors = torch.randint(VOCABULARY, (B, TOKENS), generator=g)
    positives = torch.randint(VOCABULARY, (B, TOKENS), generator=g)
    positives[:, : TOKENS // 2] = anchors[:, : TOKENS // 2]
    offsets = torch.arange(B) * TOKENS
    return [{"input_ids": ids.flatten(), "offsets": offsets} for ids in (anchors, positives)]


def loss_of(name: str, model: Any) -> Any:
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    from pycse.sentence_transformers import InfoNCELoss

    if name.startswith("mnrl"):
        theirs = MultipleNegativesRankingLoss(model)
        return MatryoshkaLoss(model, theirs, LENGTHS) if name == "mnrl lengths" else theirs
    if name.startswith("lengths"):
        return lengths_loss(model, "half" in name)
    return InfoNCELoss(model, precision="half" if name == "pycse half" else None)


def lengths_loss(model: Any, half: bool) -> Any:
    """Our loss at every length, of the columns of a batch. Equal texts are looked for, as the losses do."""
    from pycse import fused_infonce
    from pycse.sentence_transformers.texts import hashes, ids_of

    def loss(batch: list[dict[str, Tensor]], _: Any) -> Tensor:
        ids = ids_of([hashes(column) for column in batch])  # type: ignore[misc]
        z1, z2 = (model(column)["sentence_embedding"] for column in batch)
        if half:
            z1, z2 = z1.bfloat16(), z2.bfloat16()
        rows, keys = ids or (None, None)
        return fused_infonce(z1, z2, 0.05, query_ids=rows, key_ids=keys, dims=list(LENGTHS))

    return loss


def step_of(name: str, model: Any, B: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A whole training step, and the loss alone."""
    loss, batch = loss_of(name, model), columns(B)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)  # the trainer's default

    def value() -> Tensor:
        return loss([dict(column) for column in batch], None)

    def step() -> Tensor:
        optimizer.zero_grad()
        out = value()
        out.backward()
        optimizer.step()
        return out.detach()

    return step, value


def agree(values: dict[str, float], allowed: float = ALLOWED) -> None:
    first = next(iter(values.values()))
    for name, value in values.items():
        band = 0.02 if name.endswith("half") else allowed
        if not abs(value - first) <= band * abs(first):
            raise AssertionError(f"{name} computes {value}, {next(iter(values))} {first}")


PLAIN, AT_LENGTHS = ("mnrl", "pycse", "pycse half"), ("mnrl lengths", "lengths", "lengths half")


def static(B: int, seconds: float, names: tuple[str, ...] = PLAIN) -> dict[str, Timing]:
    model = static_model()
    made = {name: step_of(name, copy.deepcopy(model), B) for name in names}
    with torch.no_grad():
        agree({name: value().item() for name, (_, value) in made.items()})
    return interleaved({name: step for name, (step, _) in made.items()}, seconds)


def static_peak(name: str, B: int) -> int:
    """Bytes that a step takes above the model, its gradient and its optimizer."""
    model = static_model()
    step_of(name, model, 64)[0]()
    step, _ = step_of(name, model, B)
    small, _ = step_of(name, model, 64)
    small()
    return peak_memory(lambda: step())


def cached(seconds: float) -> dict[str, Timing]:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from pycse.sentence_transformers import CachedInfoNCELoss

    encoder = torch.nn.Sequential(torch.nn.Identity())  # not called
    losses: dict[str, Any] = {
        "cached-mnrl": CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=MINI),  # type: ignore[arg-type]
        "pycse": CachedInfoNCELoss(encoder, mini_batch_size=MINI),
        "pycse half": CachedInfoNCELoss(encoder, mini_batch_size=MINI, precision="half"),
    }
    g = torch.Generator().manual_seed(0)
    z1 = torch.randn(CACHED_ROWS, CACHED_WIDTH, generator=g)
    z2 = z1 + 2 * torch.randn(CACHED_ROWS, CACHED_WIDTH, generator=g)
    reps = {name: [[r.clone().requires_grad_() for r in z.split(MINI)] for z in (z1, z2)] for name in losses}

    def call(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for r in (*reps[name][0], *reps[name][1]):
                r.grad = None
            return losses[name].calculate_loss(reps[name], None, with_backward=True)

        return run

    calls = {name: call(name) for name in losses}
    agree({name: run().item() for name, run in calls.items()})
    first = torch.cat([r.grad for r in reps["cached-mnrl"][1]])  # type: ignore[misc]
    ours = torch.cat([r.grad for r in reps["pycse"][1]])  # type: ignore[misc]
    assert (ours - first).norm() <= ALLOWED * first.norm()
    return interleaved(calls, seconds)


def equal(B: int, seconds: float) -> tuple[Timing, Timing]:
    """The search for equal texts, and a whole step."""
    from pycse.sentence_transformers import texts

    batch = columns(B)
    step, _ = step_of("pycse", static_model(), B)

    def search() -> Any:
        return texts.ids_of([texts.hashes(column) for column in batch])  # type: ignore[misc]

    timings = interleaved({"search": search, "step": step}, seconds)
    return timings["search"], timings["step"]


def table(seconds: float) -> Any:
    from rich.table import Table

    out = Table(title="training steps with sentence-transformers")
    for column in ("what", "theirs", "pycse", "pycse half", "times as fast", "half"):
        out.add_column(column, justify="left" if column == "what" else "right")

    def row(what: str, timings: dict[str, Timing]) -> None:
        theirs, ours, half = (t.best * 1e3 for t in timings.values())
        cells = (f"{x:.1f} ms" for x in (theirs, ours, half))
        out.add_row(what, *cells, f"{theirs / ours:.2f}", f"{theirs / half:.2f}")

    for B in (2048, 8192):
        row(f"step of a StaticEmbedding, B = {B}", static(B, seconds))
        row(f"the same at {len(LENGTHS)} lengths", static(B, seconds, AT_LENGTHS))
        row("step of a whole run at these lengths, medians", whole(B))
    row(f"cached loss without the encoder, B = {CACHED_ROWS}", cached(seconds))
    for title, names in (("peak of a step", PLAIN), ("the same at 6 lengths", AT_LENGTHS)):
        peaks = [in_new_process(static_peak, name, 8192) / 1e6 for name in names]
        cells = (f"{x:.0f} MB" for x in peaks)
        out.add_row(f"{title}, B = 8192", *cells, f"{peaks[0] / peaks[1]:.2f}", f"{peaks[0] / peaks[2]:.2f}")
    search, step = equal(2048, seconds)
    share = 100 * search.best / step.best
    out.add_row(
        "search for equal texts, B = 2048", "", f"{search.best * 1e3:.1f} ms", "", f"{share:.1f}% of a step", ""
    )
    return out
