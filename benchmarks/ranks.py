"""Training over the processes of this machine: what of a step is the loss' communication, and waiting for others.

Each process has a MiniLM under DistributedDataParallel and its own rows of every batch. Three steps take turns on the
same texts, after parity of loss and gradients with one process that has the joined batch:

gathered   InfoNCELoss over all processes, as a trainer runs it
apart      the same, where processes meet at a barrier before each collective: waiting and communication by themselves,
           also of DDP's gradients, which then are not reduced beside the backward pass
alone      each process with its own negatives: what gathering costs all in all

A step is embeddings, loss, backward and AdamW; texts are tokens already.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.collectives import Call, Watch, together
from benchmarks.measure import machine
from pycse.training.errors import UserError

TOKENS = 32  # of a text, at most, as `pycse train`
PARITY_ROWS = 64  # a process: the joined batch has to fit one
LOSS_OFF, GRADIENT_OFF = 1e-5, 3e-4  # relative
TARGET, AIM = 0.08, 0.03  # the loss' share of a step, below
KINDS = ("gathered", "apart", "alone")
DDP = "DDP's gradients"

Pair = tuple[str, ...]


@dataclass
class Step:
    seconds: float
    calls: list[Call]


@dataclass
class Measured:
    """What one rank saw."""

    machine: str
    parity: tuple[float, float]  # of loss and gradient, relative
    steps: dict[str, list[Step]]


def texts() -> list[Pair]:
    """Pairs of sentences, shuffled: neighbours share a sentence, and all of a run's would belong together."""
    from pycse.training.data import default_text

    rows = default_text().with_next().rows
    random.Random(0).shuffle(rows)
    return rows


def loss_of(model: Any, gathers: bool) -> Any:
    from pycse.sentence_transformers import InfoNCELoss

    return InfoNCELoss(model, gather_across_devices=gathers)


def columns(encoder: Any, pairs: list[Pair]) -> list[dict[str, Any]]:
    """As the trainer's collator has them: in a dictionary of another type DDP would find no tensors."""
    return [dict(encoder.preprocess(list(column))) for column in zip(*pairs)]


def own(pairs: list[Pair], rank: int, B: int) -> list[Pair]:
    return pairs[rank * B : (rank + 1) * B]


def wrapped(encoder: Any) -> Any:
    """As `pycse train` does it: a pooler that is not used would keep its bucket waiting, buffers stay equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of another name for broadcast_buffers, from PyTorch 2.13 on
        return torch.nn.parallel.DistributedDataParallel(encoder, find_unused_parameters=True, broadcast_buffers=False)


def gradient(encoder: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def parity(rank: int, encoder: Any, pairs: list[Pair], B: int) -> tuple[float, float]:
    """By how much the ranks' mean loss and DDP's gradient are off one process with the joined batch.

    Raises:
        AssertionError: on every rank, where it is more than rounding.
    """
    W = dist.get_world_size()
    encoder = copy.deepcopy(encoder).eval()  # without dropout
    model = wrapped(encoder)
    loss = loss_of(model, gathers=True)(columns(encoder, own(pairs, rank, B)))
    loss.backward()
    mean = loss.detach().double()
    dist.all_reduce(mean)
    off = [0.0, 0.0]
    if rank == 0:
        ranks = gradient(encoder)
        encoder.zero_grad()
        one = loss_of(encoder, gathers=False)(columns(encoder, pairs[: W * B]))
        one.backward()
        joined = gradient(encoder)
        off = [abs(mean.item() / W / one.item() - 1), ((ranks - joined).norm() / joined.norm()).item()]
    dist.broadcast_object_list(off, 0)
    if not (off[0] <= LOSS_OFF and off[1] <= GRADIENT_OFF):
        raise AssertionError(
            f"{W} processes are off one with the joined batch: loss by {off[0]:.1e}, gradient by {off[1]:.1e}"
        )
    return off[0], off[1]


def train(rank: int, path: str, pairs: list[Pair], B: int, rounds: int) -> Measured:
    from pycse.training.encoder import load_encoder

    W, watch = dist.get_world_size(), Watch()
    encoder = load_encoder(path, "cpu")
    encoder.max_seq_length = TOKENS
    off = parity(rank, encoder, pairs, min(B, PARITY_ROWS))

    torch.manual_seed(rank)  # dropout
    model = wrapped(encoder.train())
    model.register_comm_hook(watch, _reduced)
    losses = {kind: loss_of(model, gathers=kind != "alone") for kind in KINDS}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, fused=True)

    def step(kind: str, batch: list[dict[str, Any]]) -> Step:
        given = [dict(column) for column in batch]  # a model writes into it
        watch.calls, watch.apart = [], kind == "apart"
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        losses[kind](given).backward()
        optimizer.step()
        return Step(time.perf_counter() - start, watch.calls)

    steps: dict[str, list[Step]] = {kind: [] for kind in KINDS}
    with watch:
        for r in range(rounds):
            batch = columns(encoder, own(pairs[r * W * B :], rank, B))
            for kind in KINDS:
                if r == 0:  # AdamW's state, DDP's buckets
                    step(kind, batch)
                steps[kind].append(step(kind, batch))
    return Measured(machine(), off, steps)


def _reduced(watch, bucket):  # DDP reads annotations, and takes no strings for them
    """DDP's mean of gradients: beside the backward pass as DDP has it, or by itself."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    if not watch.apart:
        return allreduce_hook(dist.group.WORLD, bucket)
    total, group = bucket.buffer().div_(dist.get_world_size()), dist.group.WORLD
    watch.timed("all_reduce", DDP, total, group, lambda: dist.all_reduce(total))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(total)
    return done


def measured(processes: int, B: int, threads: int, rounds: int, path: str, pairs: list[Pair]) -> list[Measured]:
    """By rank."""
    needed = processes * B * rounds
    if needed > len(pairs):
        raise UserError(
            f"{rounds} rounds of {processes} x {B} rows need {needed} pairs of sentences, there are {len(pairs)}; "
            "give fewer --rounds or --rows"
        )
    return together(processes, threads, train, path, pairs[:needed], B, rounds)


# --- what is said of it

Of = Callable[[Iterable[float]], float]


def of_loss(step: Step) -> list[Call]:
    return [call for call in step.calls if call.what != DDP]


def over_steps(ranks: list[Measured], kind: str, value: Callable[[Step], float], of: Of = statistics.fmean) -> float:
    """The median over steps of the ranks' mean, or of another summary of theirs."""
    return statistics.median(of([value(step) for step in steps]) for steps in zip(*(one.steps[kind] for one in ranks)))


def share(ranks: list[Measured], of: Of = statistics.fmean) -> float:
    """Of a step that is the loss' communication and waiting."""
    return over_steps(ranks, "gathered", lambda step: sum(c.seconds for c in of_loss(step)) / step.seconds, of)


def verdict(ranks: list[Measured]) -> str:
    mean, most = share(ranks), share(ranks, max)
    reached = "the aim is reached" if mean < AIM else "the target is reached" if mean < TARGET else "above both"
    return (
        f"the loss' communication and waiting: {mean:.2%} of a step (mean of the ranks; {most:.2%} where a rank waits "
        f"longest); target below {TARGET:.0%}, aim below {AIM:.0%}: {reached}"
    )


def table(ranks: list[Measured], B: int) -> Any:
    from rich.table import Table

    out = Table(title=f"a training step, {len(ranks)} processes of {B} rows: medians over steps of the ranks' mean")
    for column in ("what", "bytes", "ms", "share of the step", "waiting ms", "communication ms"):
        out.add_column(column, justify="left" if column == "what" else "right")
    step = over_steps(ranks, "gathered", lambda step: step.seconds, max)

    def collectives(what: str, chosen: Callable[[Step], list[Call]], beside: bool = True) -> None:
        """``beside``: whether they are timed in steps without barriers, too."""
        sums = lambda name: lambda step: sum(getattr(call, name) for call in chosen(step))  # noqa: E731
        parts = [over_steps(ranks, "apart", sums(name)) for name in ("waiting", "seconds")]
        plain = ["", ""]
        if beside:
            seconds = over_steps(ranks, "gathered", sums("seconds"))
            plain = [f"{seconds * 1e3:.3f}", f"{seconds / step:.2%}"]
        size = over_steps(ranks, "apart", sums("bytes"))
        out.add_row(what, f"{size:.0f}", *plain, *(f"{x * 1e3:.3f}" for x in parts))

    for kind, what in (
        ("gathered", "step, of the slowest rank"),
        ("apart", "with a barrier before each collective"),
        ("alone", "without gathering"),
    ):
        seconds = over_steps(ranks, kind, lambda step: step.seconds, max)
        out.add_row(what, "", f"{seconds * 1e3:.1f}", f"{seconds / step:.1%}", "", "")
    for k, call in enumerate(of_loss(ranks[0].steps["gathered"][0])):
        collectives(f"{k + 1}. {call.kind}: {call.what}", lambda step, k=k: of_loss(step)[k : k + 1])  # type: ignore[misc]
    collectives("the loss' collectives", of_loss)
    collectives(DDP, lambda step: [call for call in step.calls if call.what == DDP], beside=False)
    return out
