"""The loss of a static run: the recipe's function at every length of the embeddings at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycse import losses
from pycse.sentence_transformers.texts import ids_of
from pycse.training.errors import UserError
from pycse.training.recipes import RECIPES
from pycse.training.settings import Settings


class StaticLoss:
    """The sum over the lengths k of the recipe's loss of the first k features.

    Texts that are equal to a row's anchor or positive are none of its negatives. With --bf16 embeddings are compared in
    bfloat16.
    """

    def __init__(self, settings: Settings) -> None:
        self.recipe = RECIPES[settings.recipe]
        self.function = getattr(losses, self.recipe.loss).function
        self.options = settings.loss_arguments() | {"dims": list(settings.lengths)}
        self.half = settings.bf16
        self.generator = torch.Generator("cpu").manual_seed(settings.seed)  # of the shuffle
        self.parts: dict[str, float] = {}  # of the latest batch

    def __call__(self, columns: Sequence[Tensor], hashes: Sequence[Tensor], teachers: Sequence[Tensor] = ()) -> Tensor:
        """
        Args:
            columns: (B, D) embeddings of anchors, positives and perhaps hard negatives.
            hashes: (B,) of each column, equal where texts are.
            teachers: (B, D_k) embeddings of the anchors.
        """
        z1, *others = [z.bfloat16() for z in columns] if self.half else columns
        z2 = torch.cat(others) if len(others) > 1 else others[0]
        ids = ids_of(list(hashes))
        rows, keys = (None, None) if ids is None else (x.to(z1.device) for x in ids)
        given = {"query_ids": rows, "key_ids": keys} | self.options
        if not self.recipe.teaches:
            return self.function(z1, z2, **given)
        out = self.function(z1, z2, list(teachers), seed=self.generator, **given)
        self.parts = {"contrastive": float(out.contrastive), "distillation": float(out.distillation)}
        return out.loss


def check_loss(settings: Settings, device: torch.device) -> None:
    """The loss, tried once on the device, so that what cannot run is known before any work."""
    try:
        z = torch.eye(4, max(settings.lengths), dtype=torch.float32, device=device)
        more = [z] if settings.hard_negative_weight else []
        hashes = [torch.arange(4, dtype=torch.int64, device="cpu") for _ in range(2 + len(more))]
        teachers = [z] if RECIPES[settings.recipe].teaches else []
        StaticLoss(settings)([z.clone().requires_grad_(), z, *more], hashes, teachers).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error
