"""The loss of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pycse import losses
from pycse.training.errors import UserError
from pycse.training.recipes import RECIPES
from pycse.training.settings import Settings

if TYPE_CHECKING:
    from pycse.sentence_transformers import ColumnLoss


def check_loss(settings: Settings, device: Any) -> None:
    """The recipe's loss, tried once on the device, so that a backend that cannot run is known before any work."""
    rows = settings.batch_size
    try:
        loss = getattr(losses, RECIPES[settings.recipe].loss)(**settings.loss_arguments())
        z1 = torch.eye(rows, 8, dtype=torch.float32, device=device, requires_grad=True)
        z2 = torch.eye(2 * rows if settings.hard_negative_weight else rows, 8, dtype=torch.float32, device=device)
        if RECIPES[settings.recipe].teaches:
            loss(z1, z2, [z2[:rows]]).loss.backward()
        else:
            loss(z1, z2).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def build_loss(settings: Settings, encoder: Any, teachers: Sequence[Callable] = ()) -> ColumnLoss:
    """The recipe's loss over the text's columns. The shuffle's seed is the run's, of a generator of its own: dropout is
    the same with and without teachers."""
    import pycse.sentence_transformers as kinds

    recipe = RECIPES[settings.recipe]
    arguments = settings.loss_arguments()
    kind = getattr(kinds, recipe.loss if settings.cached is None else f"Cached{recipe.loss}")
    if settings.cached is not None:
        arguments["mini_batch_size"] = settings.cached
    if recipe.teaches:
        return kind(encoder, teachers, seed=settings.seed, **arguments)
    return kind(encoder, **arguments)
