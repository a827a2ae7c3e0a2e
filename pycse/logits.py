"""Logit forms: what a contrastive loss makes of a similarity, as data. Kernels know none of them by name.

    positive             l = (q s + b) s + c
    negative             l = (q s + b) s
    own hard negative    l = (q s + b) s + own_b s + own_c

Each coefficient is a :class:`Term`, linear in what may be trained: (over + m_over m) / temperature + fixed. ``fixed``
is a part of the value only, it is not differentiated: kernels take b and, for the gradient, slope = b - fixed.

A new form of this shape is an entry of ``FORMS`` and a public function.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

Number = float | Tensor  # a tensor is 0-d


class Term(NamedTuple):
    """(over + m_over m) / temperature + fixed."""

    over: float = 0.0
    m_over: float = 0.0
    fixed: float = 0.0

    def value(self, temperature: float, m: float) -> float:
        return (self.over + self.m_over * m) / temperature + self.fixed


NONE = Term()


class Coefficients(NamedTuple):
    """What kernels take (kernels/common/logit.h), in their order; gradients come back for the first ``GRADIENTS``."""

    positive_q: float
    positive_b: float
    positive_c: float
    q: float
    b: float
    slope: float
    own_b: float
    own_c: float


GRADIENTS = 5


@dataclass(frozen=True)
class Logit:
    positive: tuple[Term, Term, Term]  # q, b, c
    negative: tuple[Term, Term]  # q, b
    own: tuple[float, float] = (0.0, 0.0)  # what an own hard negative has more: b (value only), c

    @property
    def linear(self) -> bool:
        """Whether slopes are constants: kernels may then keep them out of their loops."""
        return self.positive[0] == NONE and self.negative[0] == NONE

    @property
    def has_own(self) -> bool:
        return self.own != (0.0, 0.0)

    @property
    def differentiable(self) -> tuple[Term, ...]:
        """The terms that gradients come back for."""
        return (*self.positive, *self.negative)

    @functools.lru_cache(64)  # noqa: B019 - forms are few and stay
    def coefficients(self, temperature: float, m: float) -> Coefficients:
        q, b = (t.value(temperature, m) for t in self.negative)
        slope = self.negative[1]._replace(fixed=0.0).value(temperature, m)
        positive_q, positive_b, positive_c = (t.value(temperature, m) for t in self.positive)
        return Coefficients(positive_q, positive_b, positive_c, q, b, slope, *self.own)

    def coefficients_on_device(self, temperature: Number, m: Number, like: Tensor, dtype: torch.dtype) -> Tensor:
        """(8,) coefficients for kernels, where a number is a tensor that nobody reads. A temperature <= 0 gives NaN."""
        zero = torch.zeros((), dtype=dtype, device=like.device)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(dtype)
            temperature = torch.where(temperature > 0, temperature, torch.nan)
        else:
            temperature = zero + temperature
        made: dict[Term, Tensor] = {NONE: zero}
        m = m.to(dtype) if isinstance(m, Tensor) else m
        negative_b = self.negative[1]
        terms = (*self.positive, *self.negative, negative_b._replace(fixed=0.0), *(Term(fixed=x) for x in self.own))
        for t in terms:
            if t not in made:
                over = zero + t.over if t.m_over == 0 else t.over + t.m_over * m
                made[t] = over / temperature + t.fixed
        return torch.stack([made[t] for t in terms])

    def gradients(
        self, dlogit: Tensor, temperature: Number, m: Number, needs_temperature: bool, needs_m: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dLoss/dtemperature and dLoss/dm from those of the coefficients, (GRADIENTS, B)."""
        dtemperature = dm = None
        used = [(t, d) for t, d in zip(self.differentiable, dlogit) if t.over or t.m_over]
        if needs_temperature:
            over = sum((t.over + t.m_over * m) * d if t.m_over else t.over * d for t, d in used)
            dtemperature = -over.sum() / temperature**2  # type: ignore[union-attr]
        if needs_m:
            over = sum((t.m_over * d for t, d in used if t.m_over), torch.zeros_like(dlogit[0]))
            dm = over.sum() / temperature
        return dtemperature, dm

    @functools.lru_cache(64)  # noqa: B019 - forms are few and stay
    def range(self, temperature: float, m: float) -> tuple[float, float]:
        """The lowest and the highest logit of similarities in [-1, 1]."""
        c = self.coefficients(temperature, m)
        ends: list[float] = []
        for q, b, constant in (
            (c.positive_q, c.positive_b, c.positive_c),
            (c.q, c.b, 0.0),
            (c.q, c.b + c.own_b, c.own_c),
        ):
            at = [-1.0, 1.0]
            if q != 0 and -1 < (vertex := -b / (2 * q)) < 1:
                at.append(vertex)
            ends += [(q * s + b) * s + constant for s in at]
        return min(ends), max(ends)


FORMS = {
    # SimCSE, arXiv 2104.08821, eq. 1: s / temperature
    "infonce": Logit(positive=(NONE, Term(over=1), NONE), negative=(NONE, Term(over=1))),
    # Focal-InfoNCE, arXiv 2310.06918, eq. 5: s^2 / temperature for the positive, s (s + m) / temperature for negatives
    "focal": Logit(positive=(Term(over=1), NONE, NONE), negative=(Term(over=1), Term(m_over=1))),
}
HARDNESS_MODES = ("all_negatives", "in_batch_negatives", "hard_negatives")  # the negatives that ``hardness`` weighs


@functools.cache
def logit(
    form: str,
    positive_margin: float = 0.0,
    hardness: float = 0.0,
    hardness_mode: str = "all_negatives",
    hard_negative_weight: float = 0.0,
) -> Logit:
    """A form with its options: a margin taken from the positive's similarity, l_pos - positive_margin / temperature;
    hardness added to negatives as hardness * s, its s not differentiated; and the weight of own hard negatives."""
    result = FORMS[form]
    if positive_margin:
        q, b, _ = result.positive
        result = replace(result, positive=(q, b, Term(over=-positive_margin)))
    own_b = 0.0
    if hardness:
        q, b = result.negative
        if hardness_mode != "hard_negatives":
            result = replace(result, negative=(q, b._replace(fixed=hardness)))
        own_b = {"all_negatives": 0.0, "in_batch_negatives": -hardness, "hard_negatives": hardness}[hardness_mode]
    return replace(result, own=(own_b, hard_negative_weight)) if own_b or hard_negative_weight else result
