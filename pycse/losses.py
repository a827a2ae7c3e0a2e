"""The losses as modules. They hold configuration only; pycse.functional does the work."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycse import validation
from pycse.backends import CHOICES
from pycse.distillation import DistillCSEOutput, fused_distill, fused_distillcse
from pycse.functional import fused_focal_infonce, fused_infonce
from pycse.problem import REDUCTIONS


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


class DistillLoss(nn.Module):
    """Module form of :func:`pycse.fused_distill`; see there for formula, arguments and errors.

    Options of the loss are fixed here; what belongs to a batch (teachers, teacher_logits, seed, weight) is given to
    ``forward``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        _known_options(fused_distill, options, belongs_to_batch=("z", *_BATCH))
        self.options = options

    def forward(
        self,
        z: Tensor,
        teachers: Sequence[Tensor] | None = None,
        *,
        teacher_logits: Tensor | None = None,
        seed: int | Tensor | torch.Generator | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return fused_distill(z, teachers, teacher_logits=teacher_logits, seed=seed, weight=weight, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DistillCSELoss(nn.Module):
    """Module form of :func:`pycse.fused_distillcse`; see there for formula, arguments and errors.

    As :class:`DistillLoss`; ``temperature`` and ``m`` may be ``nn.Parameter``s, which are registered and trained.
    """

    def __init__(self, temperature: float | Tensor = 0.05, m: float | Tensor | None = None, **options: Any) -> None:
        super().__init__()
        validation.real("temperature", temperature, positive=True)
        if m is not None:
            validation.real("m", m)
        _known_options(fused_distillcse, options, belongs_to_batch=("z1", "z2", *_BATCH))
        self.temperature, self.m, self.options = temperature, m, options

    def forward(
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
        shown = {"temperature": self.temperature, "m": self.m, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if not isinstance(value, Tensor))


_BATCH = ("teachers", "teacher_logits", "seed", "positives", "query_ids", "key_ids", "weight")


def _known_options(function: Any, options: dict[str, Any], belongs_to_batch: tuple[str, ...]) -> None:
    """Unknown or contradictory options fail when the module is made, not in the first step."""
    parameters = inspect.signature(function).parameters
    names = [n for n in parameters if n not in (*belongs_to_batch, "temperature", "m")]
    for name in options:
        if name not in names:
            why = (
                "belongs to a batch: give it to forward"
                if name in belongs_to_batch and name in parameters
                else f"is none of {', '.join(names)}"
            )
            raise TypeError(f"option {name!r} {why}")
    validation.distillation_options(**{n: v for n, v in options.items() if n in validation.DISTILLATION_OPTIONS})
    for name, allowed in (("reduction", REDUCTIONS), ("backend", CHOICES)):
        if name in options:
            validation.choice(name, options[name], allowed)
