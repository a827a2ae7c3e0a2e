"""The recipes that `pycse train` knows, in one table: recipe -> loss and the settings that belong to it alone."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recipe:
    """A loss class of pycse.losses, its own settings with their defaults, and where it comes from."""

    loss: str
    source: str
    own: dict[str, float] = field(default_factory=dict)


RECIPES = {
    "focal": Recipe("FocalInfoNCELoss", "Hou & Li, Findings of EMNLP 2023", {"m": 0.3}),
    "simcse": Recipe("InfoNCELoss", "Gao, Yao & Chen, EMNLP 2021"),
}

# Settings that every loss takes.
SHARED = ("temperature", "hard_negative_weight", "symmetric", "backend")
