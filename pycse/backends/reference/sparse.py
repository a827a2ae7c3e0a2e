"""The oracle: dense products with W ⊙ M, as written.

    y = x (W ⊙ M)ᵀ + b,    dX = dY (W ⊙ M),    dW = (dYᵀ X) ⊙ M

Weights outside the mask count as 0 whatever they hold (NaN and Inf included), and dW is exactly 0 there.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pycse.pattern import Pattern, unpack_mask


def _kept(weight: Tensor, mask: Tensor) -> Tensor:
    return weight.masked_fill(~mask, 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    return F.linear(x, _kept(weight, pattern.mask()), bias)


def dx(dy: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    return dy @ _kept(weight, pattern.mask())


def dw(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    return _kept(dy.t() @ x, pattern.mask())


def masked(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _kept(weight, unpack_mask(bits, weight.shape[1])), bias)


def masked_dx(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    return dy @ _kept(weight, unpack_mask(bits, weight.shape[1]))


def masked_dw(dy: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    return _kept(dy.t() @ x, unpack_mask(bits, x.shape[1]))
