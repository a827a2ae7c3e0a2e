"""The losses as modules. They hold configuration only; pycse.functional does the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycse import validation
from pycse.backends import CHOICES
from pycse.distillation import DistillCSEOutput, fused_distillcse
from pycse.functional import fused_focal_infonce, fused_infonce
from pycse.problem import DIVERGENCES, REDUCTIONS, SHUFFLES


class InfoNCELoss(nn.Module):
    """Module form of :func:`pycse.fused_infonce`; see there for formula, arguments and errors.

    What belongs to a batch (positives, query_ids, key_ids, weight) is given to ``forward``; the rest is fixed here. A
    temperature that is an ``nn.Parameter`` is registered and trained.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        *,
        hard_negative_weight: float = 0.0,
        exclude_above: float | None = None,
        symmetric: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        validate: bool = False,
    ) -> None:
        super().__init__()
        validation.real("temperature", temperature, positive=True)
        validation.real("hard_negative_weight", hard_negative_weight)
        validation.choice("reduction", reduction, REDUCTIONS)
        validation.choice("backend", backend, CHOICES)
        self.temperature = temperature
        self.options: dict[str, Any] = dict(
            hard_negative_weight=hard_negative_weight,
            exclude_above=exclude_above,
            symmetric=symmetric,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
            validate=validate,
        )

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        positives: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return fused_infonce(
            z1,
            z2,
            self.temperature,
            positives=positives,
            query_ids=query_ids,
            key_ids=key_ids,
            weight=weight,
            **self.options,
        )

    def extra_repr(self) -> str:
        shown = {"temperature": self.temperature, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if not isinstance(value, Tensor))


class FocalInfoNCELoss(InfoNCELoss):
    """Module form of :func:`pycse.fused_focal_infonce`; see there for formula, arguments and errors.

    As :class:`InfoNCELoss`, with the hardness ``m``, which may be an ``nn.Parameter`` as well.
    """

    def __init__(self, temperature: float | Tensor = 0.05, m: float | Tensor = 0.3, **options: Any) -> None:
        super().__init__(temperature, **options)
        validation.real("m", m)
        self.m = m

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        positives: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return fused_focal_infonce(
            z1,
            z2,
            self.temperature,
            self.m,
            positives=positives,
            query_ids=query_ids,
            key_ids=key_ids,
            weight=weight,
            **self.options,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if isinstance(self.m, Tensor) else f", m={self.m!r}")


class DistillCSELoss(InfoNCELoss):
    """Module form of :func:`pycse.fused_distillcse`; see there for formula, arguments and errors.

    As :class:`InfoNCELoss`, with the options of the distillation. Teachers, or their averaged similarities, belong to a
    batch, and so does the seed of the shuffle. ``m`` (None: InfoNCE) may be an ``nn.Parameter`` as well.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        m: float | Tensor | None = None,
        *,
        distill_weight: float = 1.0,
        student_temperature: float = 0.025,
        teacher_temperature: float = 0.0125,
        group_temperature: float = 1.0,
        teacher_weights: Sequence[float] | None = None,
        group_p: float | None = None,
        group_size: int | None = None,
        span: tuple[int, int] | None = None,
        shuffle: str = "sample",
        divergence: str = "ce",
        **options: Any,
    ) -> None:
        super().__init__(temperature, **options)
        if m is not None:
            validation.real("m", m)
        validation.number("distill_weight", distill_weight)
        temperatures = dict(
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            group_temperature=group_temperature,
        )
        for name, value in temperatures.items():
            validation.number(name, value)
            validation.real(name, value, positive=True)
        validation.choice("shuffle", shuffle, SHUFFLES)
        validation.choice("divergence", divergence, DIVERGENCES)
        self.m = m
        self.options |= temperatures | dict(
            distill_weight=distill_weight,
            teacher_weights=teacher_weights,
            group_p=group_p,
            group_size=group_size,
            span=span,
            shuffle=shuffle,
            divergence=divergence,
        )

    def forward(  # type: ignore[override]
        self,
        z1: Tensor,
        z2: Tensor,
        teachers: Sequence[Tensor] | None = None,
        *,
        teacher_logits: Tensor | None = None,
        seed: int | Tensor | torch.Generator | None = None,
        positives: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> DistillCSEOutput:
        return fused_distillcse(
            z1,
            z2,
            teachers,
            self.temperature,
            self.m,
            teacher_logits=teacher_logits,
            seed=seed,
            positives=positives,
            query_ids=query_ids,
            key_ids=key_ids,
            weight=weight,
            **self.options,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if isinstance(self.m, Tensor) else f", m={self.m!r}")
