"""Batches of several datasets, for several processes: one dataset a step.

accelerate deals one stream of batches to W processes in turn, batch k to process k mod W. sentence-transformers' own
samplers draw a dataset for every batch, so in one step the processes hold batches of different datasets: a loss that
gathers over processes would compare texts of different datasets, and where each dataset has a loss of its own,
different losses would meet. Here a dataset is drawn for W batches that follow each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from sentence_transformers.base.sampler import (
    MultiDatasetDefaultBatchSampler,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)
from torch.utils.data import BatchSampler, ConcatDataset, Sampler

from pycse.validation import choice

ORDERS: dict[str, Callable[..., MultiDatasetDefaultBatchSampler]] = {
    "proportional": ProportionalBatchSampler,
    "round_robin": RoundRobinBatchSampler,
}


def same_dataset_batches(order: Any = "proportional") -> Callable[..., MultiDatasetDefaultBatchSampler]:
    """For ``multi_dataset_batch_sampler``: in every step all processes have batches of one dataset.

        args = SentenceTransformerTrainingArguments(..., multi_dataset_batch_sampler=same_dataset_batches())

    With one process this is sentence-transformers' own sampler. With W, a dataset is drawn for W batches at a time. The
    batches that a dataset has left when there are no W any more (W - 1 at most) are not trained on in that epoch; they
    are other rows in the next, since every epoch is shuffled anew.

    Args:
        order: "proportional" (every dataset until it ends, drawn in proportion to its batches) or "round_robin" (each
            dataset in turn, until one ends), or one of sentence-transformers' MultiDatasetBatchSamplers.

    Returns:
        What the trainer calls with the datasets and their batch samplers. It can be pickled, as training arguments are
        with every checkpoint.

    Raises:
        ValueError: another order. When the trainer makes its batches, with several processes: a dataset of fewer than W
            full batches, which would never be trained on; batches of different sizes, or that are not full
            (``dataloader_drop_last=False``, which the trainer itself changes under torch.distributed), since accelerate
            deals full ones only.

    Source: the order of :class:`accelerate.data_loader.BatchSamplerShard`.
    """
    order = getattr(order, "value", order)
    choice("order", order, tuple(ORDERS))
    return functools.partial(_sampler, order)


def _sampler(
    order: str,
    dataset: ConcatDataset,
    batch_samplers: list[BatchSampler],
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> MultiDatasetDefaultBatchSampler:
    from accelerate import PartialState  # what a trainer needs, and losses do not

    # All processes: where some of them share batches (tensor parallelism), a group is several steps of one dataset.
    W = PartialState().num_processes
    if W == 1:
        return ORDERS[order](dataset, batch_samplers, generator=generator, seed=seed)
    return SameDatasetBatchSampler(dataset, batch_samplers, generator, seed, order=order, processes=W)


class _Groups(Sampler[list[int]]):
    """A dataset's batches, W full ones behind one another as one; those that do not make W are left out."""

    drop_last = True

    def __init__(self, batches: BatchSampler, W: int) -> None:
        self.batches, self.W, self.batch_size = batches, W, W * batches.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        full = (batch for batch in self.batches if len(batch) == self.batches.batch_size)
        while len(group := list(islice(full, self.W))) == self.W:
            yield list(chain.from_iterable(group))

    def __len__(self) -> int:
        return len(self.batches) // self.W


class SameDatasetBatchSampler(MultiDatasetDefaultBatchSampler):
    """Batches of several datasets, W of one dataset at a time: see :func:`same_dataset_batches`, which makes it."""

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None,
        seed: int,
        *,
        order: str,
        processes: int,
    ) -> None:
        super().__init__(dataset, batch_samplers, generator=generator, seed=seed)
        W, B = processes, self.batch_size
        sizes = [batches.batch_size for batches in batch_samplers]
        lengths = [len(batches) for batches in batch_samplers]
        if not self.drop_last:
            raise ValueError(
                f"dataloader_drop_last must be True with {W} processes, which are dealt full batches only, got "
                f"{self.drop_last!r}"
            )
        if set(sizes) != {B}:
            raise ValueError(f"batch_sampler must give batches of one size with {W} processes, got {sizes}")
        if min(lengths) < W:
            raise ValueError(
                f"every dataset must have at least {W} full batches of {B} rows, one a process, got {lengths} batches"
            )
        groups = [_Groups(batches, W) for batches in batch_samplers]
        self.processes = W
        self.groups = ORDERS[order](dataset, groups, generator=generator, seed=seed)
        # Where training resumes amid an epoch, accelerate has two samplers around this one and tells neither the epoch,
        # but it does tell a dataset that wants to know. Without this the rest of epoch 0 would come again.
        dataset.set_epoch = self.set_epoch  # type: ignore[attr-defined]

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.groups.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for group in self.groups:
            yield from (group[first : first + self.batch_size] for first in range(0, len(group), self.batch_size))

    def __len__(self) -> int:
        return self.processes * len(self.groups)
