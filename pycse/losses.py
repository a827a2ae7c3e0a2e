"""The losses as modules. They hold configuration only; pycse.functional does the work."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pycse import validation
from pycse.backends import CHOICES
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
