"""What one contrastive call computes: the arguments after validation, and what comes back.

The names follow kernels/README.md. A ``Contrastive`` is what the op hands to a backend; every backend returns a ``Result``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
FIXED_RANGE = 80.0  # of logits, see Contrastive.shift


class Needs(NamedTuple):
    """Which gradients to compute."""

    z1: bool = False
    z2: bool = False
    temperature: bool = False
    m: bool = False
    weight: bool = False


@dataclass
class Contrastive:
    z1: Tensor  # (B, D)
    z2: Tensor  # (N, D)
    temperature: float | Tensor
    m: float | Tensor
    focal: bool
    positives: Tensor | None = None  # (B,) int64
    query_ids: Tensor | None = None  # (B,) int64
    key_ids: Tensor | None = None  # (N,) int64
    weight: Tensor | None = None  # (B,)
    hard_negative_weight: float = 0.0
    exclude_above: float | None = None
    symmetric: bool = False
    normalize: bool = True
    reduction: str = "mean"
    needs: Needs = Needs()

    @property
    def acc(self) -> torch.dtype:
        """Accumulation type: losses, norms and row factors."""
        return torch.float64 if self.z1.dtype == torch.float64 else torch.float32

    @property
    def shift(self) -> float | None:
        """What to subtract from every logit instead of the row's maximum, or None where only the maximum is safe.

        With unit rows the logits lie in [low, high]. While high - low <= 80, exp(l - (high - 40)) lies in
        [exp(-40), exp(40)]: neither it nor its product with a key's inverse norm leaves float's range, so no maximum is
        needed before the sum.
        """
        if not self.normalize or isinstance(self.temperature, Tensor) or isinstance(self.m, Tensor):
            return None
        if self.focal:
            m = abs(self.m)
            high, low = 1 + m, (-m * m / 4 if m <= 2 else 1 - m)
        else:
            high, low = 1.0, -1.0
        w = abs(self.hard_negative_weight)
        high, low = high / self.temperature + w, low / self.temperature - w
        return high - FIXED_RANGE / 2 if high - low <= FIXED_RANGE else None

    def row_coefficients(self) -> Tensor | float:
        """dLoss/dL_i: (B,) in ``acc``, or one number for all rows."""
        if self.weight is None:
            return 1 / self.z1.shape[0] if self.reduction == "mean" else 1.0
        weight = self.weight.to(self.acc).contiguous()  # an upstream gradient may be expanded
        return weight / weight.sum() if self.reduction == "mean" else weight

    def reduce(self, rows: Tensor) -> Tensor:
        """(B,) losses to what the caller asked for."""
        coef = self.row_coefficients()
        rows = rows * coef
        return rows if self.reduction == "none" else rows.sum()

    def weight_gradient(self, rows: Tensor) -> Tensor:
        """dLoss/dw_i from the rows' losses, for "mean" (quotient rule) and "sum"."""
        assert self.weight is not None
        if self.reduction == "sum":
            return rows
        total = self.weight.to(self.acc).sum()
        return (rows - self.reduce(rows)) / total


class Result(NamedTuple):
    """Row losses and the gradients of the reduced loss; None where not needed."""

    rows: Tensor
    dz1: Tensor | None = None
    dz2: Tensor | None = None
    dtemperature: Tensor | None = None
    dm: Tensor | None = None
    loss: Tensor | None = None  # the reduced loss, where the kernel has made it already
