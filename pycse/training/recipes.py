"""The recipes that `pycse train` knows, in one table: recipe -> loss and the settings that belong to it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A loss class of pycse.losses, where it comes from, and what belongs to it.

    Fields:
        own: settings that not every recipe has, with their defaults.
        teaches: whether teachers take part.
        prunes: whether parameters are removed after the training, and the rest trained again.
        lr: its default.
    """

    loss: str
    source: str
    own: dict[str, Any] = field(default_factory=dict)
    teaches: bool = False
    prunes: bool = False
    lr: float = 1e-5


RECIPES = {
    "distillcse": Recipe(
        "DistillCSELoss",
        "Xu et al., Findings of EMNLP 2023",
        {
            "m": None,  # InfoNCE, as published
            "distill_weight": 1.0,
            "student_temperature": 0.025,
            "teacher_temperature": 0.0125,
            "group_temperature": 1.0,
            "group_p": None,  # 0.1, as published, where no other grouping is given
            "group_size": None,
            "span": None,
            "shuffle": "sample",
            "divergence": "ce",
        },
        teaches=True,
        lr=1e-4,
    ),
    "focal": Recipe("FocalInfoNCELoss", "Hou & Li, Findings of EMNLP 2023", {"m": 0.3}),
    "simcse": Recipe("InfoNCELoss", "Gao, Yao & Chen, EMNLP 2021"),
    "sparsecse": Recipe("InfoNCELoss", "An, Zhang & Song 2023", prunes=True),
}

# Settings of the removal of parameters, for recipes that prune and for `pycse sparsify`, with their defaults.
PRUNING: dict[str, Any] = {
    "sparsity": 0.1,
    "granularity": "weight",
    "scope": None,  # of pycse.sparse.sparsify
    "block": 32,
    "balance": 0.5,
    "means": "global",
    "score_batches": 16,
    "finetune_steps": None,  # half of the training's for a recipe; none for `pycse sparsify`
}

# Settings that every loss takes.
SHARED = ("temperature", "hard_negative_weight", "symmetric", "backend")


def recipes_with(name: str) -> list[str]:
    """The recipes that a setting of their own belongs to."""
    return [key for key, recipe in RECIPES.items() if name in recipe.own]
