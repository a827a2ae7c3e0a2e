"""Losses of batches whose activations do not fit: embeddings first, without gradients; one loss over all of them; then
mini-batches again, with its gradients (GradCache).

The encoder's memory is that of a mini-batch, twice its forward passes are made. Each mini-batch is embedded again under
the random state of the first time, so gradients are those of the loss without a cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext, _create_minibatch
from torch import Tensor

from pycse.sentence_transformers import citations
from pycse.sentence_transformers.columns import NO_EMBEDDING, Batch, ColumnLoss
from pycse.sentence_transformers.distillation import DistillCSELoss
from pycse.sentence_transformers.losses import FocalInfoNCELoss, InfoNCELoss
from pycse.validation import flag, whole

FLAT = "flat_input_ids"  # a StaticEmbedding's tokens, which have no batch axis: under this name offsets say the rows


def flat(features: dict[str, Any]) -> dict[str, Any]:
    """A StaticEmbedding's column as CachedLossMixin counts its rows: by the first tensor, where no name is known."""
    rest = {name: value for name, value in features.items() if name not in ("offsets", "input_ids")}
    return {"offsets": features["offsets"], FLAT: features["input_ids"], **rest}


def minibatch(features: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Rows [begin, end) of a column."""
    if FLAT not in features:
        return _create_minibatch(features, begin, end)
    offsets, ids = features["offsets"], features[FLAT]
    first = offsets[begin]
    last = offsets[end] if end < len(offsets) else len(ids)
    rest = {name: value for name, value in features.items() if name not in ("offsets", FLAT)}
    return {"input_ids": ids[first:last], "offsets": offsets[begin:end] - first, **rest}


class _Known(torch.autograd.Function):
    """A value whose gradients are known already: they wait for the upstream one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *(upstream * g for g in ctx.gradients)


def _check_alike(upstream: Tensor, group: Any) -> None:
    from pycse import distributed

    if values := distributed.differ(upstream, group):
        raise ValueError(
            "a cached loss over several processes needs the same upstream gradient on all of them, since it has summed "
            f"their gradients in forward; got {values} by rank"
        )


class Cached(CachedLossMixin):
    """GradCache for a loss of columns, before it among a class's bases.

    Args, beside the loss' own:
        mini_batch_size: rows that are embedded at a time.
        mini_batch_num_tokens: or as many as hold so many tokens.
        show_progress_bar: of the mini-batches.
    """

    def __init__(
        self,
        *args: Any,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        tokens = 1 if mini_batch_num_tokens is None else mini_batch_num_tokens
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", tokens)):
            whole(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        flag("show_progress_bar", show_progress_bar)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any = None) -> Tensor:
        assert isinstance(self, ColumnLoss)
        columns, batch = self.prepared(sentence_features, labels)
        if any(column.get("offsets") is not None and FLAT not in column for column in columns):
            if self.mini_batch_num_tokens is not None:
                raise ValueError("mini_batch_num_tokens counts a transformer's tokens; give mini_batch_size instead")
            columns = [flat(column) for column in columns]
        if not torch.is_grad_enabled():
            return self.forward_cached(columns, batch)  # type: ignore[arg-type]  # it hands labels on as they are
        # forward_cached detaches the loss; what of it leads to this module's own parameters is kept, with the weights
        # that a MatryoshkaLoss puts on it.
        calculate, wrapped = self.calculate_loss, "calculate_loss" in vars(self)
        attached: list[Tensor] = []

        def kept(*args: Any, **options: Any) -> Tensor:
            attached.append(calculate(*args, **options))
            return attached[-1]

        self.calculate_loss = kept  # type: ignore[method-assign]
        try:
            loss = self.forward_cached(columns, batch)  # type: ignore[arg-type]
        finally:
            del self.calculate_loss
            if wrapped:
                self.calculate_loss = calculate  # type: ignore[method-assign]
        if (group := self.group) is not None:
            # The gradients in the cache are those of upstream gradients of 1, summed over ranks.
            loss.register_hook(lambda upstream: _check_alike(upstream, group))
        if attached[-1].requires_grad:
            loss.register_hook(lambda upstream: torch.autograd.backward(attached[-1], upstream))
        return loss

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        features = minibatch(sentence_feature, begin, end)
        with nullcontext() if random_state is None else random_state, nullcontext() if with_grad else torch.no_grad():
            kept = RandContext(*(v for v in features.values() if isinstance(v, Tensor))) if copy_random_state else None
            output = self.model(features)
            if "sentence_embedding" not in output:
                raise ValueError(NO_EMBEDDING)
            return output["sentence_embedding"], kept

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        assert isinstance(self, ColumnLoss)
        batch = labels if isinstance(labels, Batch) else Batch(labels)
        if not with_backward:
            return self.compute_loss_from_embeddings([torch.cat(column) for column in reps], batch)
        with torch.enable_grad():
            loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], batch)
            embeddings = [rep for column in reps for rep in column]
            own = [p for p in self.parameters(recurse=False) if p.requires_grad]
            gradients = torch.autograd.grad(loss, [*embeddings, *own], allow_unused=True)
            for rep, gradient in zip(embeddings, gradients):
                rep.grad = gradient if rep.grad is None or gradient is None else rep.grad + gradient
            known = [(p, g) for p, g in zip(own, gradients[len(embeddings) :]) if g is not None]
            if not known:
                return loss.detach()
            return _Known.apply(loss.detach(), [g for _, g in known], *(p for p, _ in known))

    def get_config_dict(self) -> dict[str, Any]:
        own = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return super().get_config_dict() | own  # type: ignore[misc]

    @property
    def citation(self) -> str:
        return super().citation + citations.GRADCACHE  # type: ignore[misc]


class CachedInfoNCELoss(Cached, InfoNCELoss):
    """:class:`InfoNCELoss` of batches of any size; see there and :class:`Cached` for its arguments."""


class CachedFocalInfoNCELoss(Cached, FocalInfoNCELoss):
    """:class:`FocalInfoNCELoss` of batches of any size; see there and :class:`Cached` for its arguments."""


class CachedDistillCSELoss(Cached, DistillCSELoss):
    """:class:`DistillCSELoss` of batches of any size; see there and :class:`Cached` for its arguments."""
