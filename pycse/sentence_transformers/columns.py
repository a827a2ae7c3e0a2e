"""What a loss is to sentence-transformers' trainer: a module that embeds the columns of a batch and compares them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pycse.sentence_transformers import texts
from pycse.validation import choice, flag

PRECISIONS = ("full", "half")
NO_EMBEDDING = (
    "the model gives no 'sentence_embedding', which a loss of sentences needs: does it end with a Pooling module?"
)


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def _embed_columns() -> Callable[..., list[Tensor]]:
    """sentence-transformers' own way, which embeds like columns in one pass; before 6.2 one pass a column."""
    try:
        from sentence_transformers.base.losses.merged_forward import embed_columns
    except ImportError:
        return lambda model, columns: [model(features)["sentence_embedding"] for features in columns]
    return embed_columns


def _layer_by_layer() -> bool:
    """Whether AdaptiveLayerLoss calls, which keeps what it needs in the very dictionaries it gives."""
    from sentence_transformers.base.losses import merged_forward

    disabled = getattr(merged_forward, "_MERGING_DISABLED", None)
    return disabled is not None and disabled.get()


class Batch(NamedTuple):
    """What a batch has beside embeddings."""

    labels: Any = None
    ids: tuple[Tensor, Tensor] | None = None  # of rows and keys
    columns: list[dict[str, Any]] | None = None  # as they were given
    dropout_views: bool = False  # the second column is the first once more


class ColumnLoss(nn.Module):
    """Base of the losses: embeds every column once, in their order, and calls :meth:`compare` with all of them.

    Columns are anchor, positive, negatives. A single column is embedded twice, and the model's dropout makes the two
    views differ (SimCSE).

    Args:
        model: the SentenceTransformer that is trained. The trainer puts its wrapped form (DDP, compiled) in its place.
        deduplicate: leave out of a row's negatives what is equal to its anchor or positive, and the positives of rows
            whose anchor or positive is equal to one of them. Texts are equal where their token ids are (prompts
            included, padding not). Equality chains: if rows 1 and 2 share an anchor, and rows 2 and 3 a positive, all
            three belong together.
        precision: "full" or None compares embeddings as they come, which with the trainer's mixed precision is float32
            (within an autocast of one's own what that makes of them); "half" rounds them to bfloat16, for which the
            kernels are about twice as fast.
        gather_across_devices: compare with the columns of all processes, where torch.distributed has several: the mean
            over processes is the loss of their joined batch, and DDP's averaged gradients are its gradients.
        group: the processes, a torch.distributed.ProcessGroup; None: all of them.
    """

    fewest_columns = 1

    def __init__(
        self,
        model: nn.Module,
        deduplicate: bool = True,
        precision: str | None = None,
        gather_across_devices: bool = True,
        group: Any = None,
    ) -> None:
        super().__init__()
        flag("deduplicate", deduplicate)
        flag("gather_across_devices", gather_across_devices)
        if precision is not None:
            choice("precision", precision, PRECISIONS)
        self.model = model
        self.deduplicate, self.precision = deduplicate, precision
        self.gather_across_devices, self._group = gather_across_devices, group
        self.state_kept = False  # by LossState
        self._checked: set[str] = set()

    @property
    def group(self) -> Any:
        """The processes that share a batch; None where each has its own."""
        if not self.gather_across_devices or not several_processes():
            return None
        return self._group or "world"

    def number(self, name: str) -> Any:
        """A number of the loss; where it is trained and processes do not gather, with its gradient averaged."""
        value = getattr(self, name)
        if isinstance(value, Tensor) and value.requires_grad and self.group is None and several_processes():
            from pycse import distributed

            return distributed.averaged(value)
        return value

    def own_options(self) -> dict[str, Any]:
        """What the loss was made with, for get_config_dict."""
        return {
            "deduplicate": self.deduplicate,
            "precision": self.precision,
            "gather_across_devices": self.gather_across_devices,
        }

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any = None) -> Tensor:
        columns, batch = self.prepared(sentence_features, labels)
        try:
            embeddings = _embed_columns()(self.model, columns)
        except KeyError as error:
            raise ValueError(NO_EMBEDDING) from error if error.args == ("sentence_embedding",) else error
        return self.compute_loss_from_embeddings(embeddings, batch)

    def prepared(self, sentence_features: Iterable[dict[str, Any]], labels: Any) -> tuple[list[dict[str, Any]], Batch]:
        """The columns to embed, and what is read of them before a model changes them in place."""
        columns = list(sentence_features)
        if len(columns) < self.fewest_columns:
            raise ValueError(
                f"{type(self).__name__} needs a dataset with at least {self.fewest_columns} column(s) of texts, got "
                f"{len(columns)} (the columns label, labels, score and scores are labels)"
            )
        views = len(columns) == 1 and self.wants_positives
        if views:
            if _layer_by_layer():
                raise ValueError(
                    "one column under AdaptiveLayerLoss cannot be embedded twice: it keeps every layer in the "
                    "dictionaries of its columns; give the column twice in the dataset"
                )
            columns.append(dict(columns[0]))  # a model writes into the dictionary it is given
        self._warn_once()
        ids = self._ids(columns) if self.deduplicate and self.wants_positives else None
        return columns, Batch(labels, ids, columns, views)

    def _ids(self, columns: list[dict[str, Any]]) -> tuple[Tensor, Tensor] | None:
        """Of rows and keys; equal where the texts of all processes say that they belong together."""
        found = [texts.hashes(column) for column in columns]
        hashed = [h for h in found if h is not None]
        known = len(hashed) == len(found)
        if not known and "texts" not in self._checked:
            self._checked.add("texts")
            warnings.warn(
                "deduplicate=True finds no token ids in these columns, so equal inputs are not recognised",
                stacklevel=3,
            )
        fit = known and len({len(h) for h in hashed}) == 1  # else the loss says which column is shorter
        if self.group is None:
            return texts.ids_of(hashed) if fit else None
        from pycse import distributed

        first = next(x for x in columns[0].values() if isinstance(x, Tensor))
        every, own = distributed.joined_rows(type(self).__name__, hashed if fit else None, first.device, self.group)
        ids = texts.ids_of(every) if every else None
        if ids is None:
            return None
        rows, keys = ids
        return rows[own], torch.cat([column[own] for column in keys.split(len(rows))])

    wants_positives = True  # whether columns beside the anchor are compared with it

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any = None) -> Tensor:
        """The loss of columns that are embedded already: (B, D) each. ``labels`` are the dataset's."""
        batch = labels if isinstance(labels, Batch) else Batch(labels)
        rows = [len(z) for z in embeddings]
        try:
            self._check_embeddings(embeddings, batch)
        except ValueError as error:
            if self.group is not None:  # the other processes are about to meet this one
                from pycse import distributed

                distributed.refuse(error, embeddings[0], self.group)
            raise
        if self.precision == "half":
            embeddings = [z.to(torch.bfloat16) for z in embeddings]
        alone = len(embeddings) == 2 and rows[0] == 1 and self.wants_positives and self.group is None
        if alone and "one" not in self._checked:
            self._checked.add("one")
            warnings.warn(
                "a batch of one row has no negatives: its loss is constant. dataloader_drop_last=True leaves the last, "
                "smaller batch of an epoch out",
                stacklevel=2,
            )
        return self.compare(embeddings, batch)

    def _check_embeddings(self, embeddings: list[Tensor], batch: Batch) -> None:
        rows = [len(z) for z in embeddings]
        if len(set(rows)) > 1:
            raise ValueError(f"every column must have as many rows as the first, got {rows}")
        if batch.dropout_views and self.model.training and rows[0] and "views" not in self._checked:
            self._checked.add("views")
            if torch.equal(embeddings[0], embeddings[1]):
                raise ValueError(
                    "one column is embedded twice for two views by dropout, and both views are equal: this model has "
                    "no dropout (a StaticEmbedding never has). Give the dataset a column of positives"
                )

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        raise NotImplementedError

    def _warn_once(self) -> None:
        trained = [name for name, p in self.named_parameters(recurse=False) if p.requires_grad]
        if trained and self.training and not self.state_kept and "state" not in self._checked:
            self._checked.add("state")
            warnings.warn(
                f"{', '.join(trained)} of the loss is trained, but checkpoints hold the model alone: pass "
                "callbacks=[LossState(loss)] to the trainer to save and restore it",
                stacklevel=2,
            )

    @property
    def citation(self) -> str:
        raise NotImplementedError
