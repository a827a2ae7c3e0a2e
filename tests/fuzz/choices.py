"""Where choices come from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


class Seeded:
    """From a seed: case ``index`` of a run."""

    def __init__(self, seed: int, index: int) -> None:
        self.random = random.Random(seed * 1_000_003 + index)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.random.random() * len(options))]

    def whole(self, low: int, high: int) -> int:
        return low + int(self.random.random() * (high - low + 1))

    def chance(self, p: float) -> bool:
        return self.random.random() < p


class Drawn:
    """From hypothesis, which shrinks towards the first option, the lowest number and False."""

    def __init__(self, draw: Any) -> None:
        from hypothesis import strategies

        self.draw, self.strategies = draw, strategies

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(self.strategies.sampled_from(options))

    def whole(self, low: int, high: int) -> int:
        return self.draw(self.strategies.integers(low, high))

    def chance(self, p: float) -> bool:
        return self.draw(self.strategies.integers(0, 99)) >= 100 - round(100 * p)
