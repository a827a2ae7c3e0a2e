"""The loss of a recipe, and what sentence-transformers calls for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pycse import losses
from pycse.training.data import Text
from pycse.training.errors import UserError
from pycse.training.recipes import RECIPES
from pycse.training.settings import Settings


def build_loss(settings: Settings, device):
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
    return loss


def column_loss(encoder, loss, text: Text | None = None, teachers: Sequence[Callable] = (), seed: int = 0):
    """The adapter to sentence-transformers: embed every column, then one call of a pycse loss.

    One column: the sentence is embedded twice, and dropout makes the two views differ (SimCSE). Two: z1 and z2.
    Three: the hard negatives stand below the positives in z2. With teachers, z1 is the student that is distilled.

    Args:
        text: where teachers find the sentences of a batch, whose labels are row numbers; each tokenizes for itself.
        teachers: sentences -> (B, D_k) embeddings.
        seed: of the shuffle, which has a generator of its own: dropout is the same with and without it.
    """

    class ColumnLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = encoder
            self.loss = loss
            self.parts: dict[str, list] = {"contrastive": [], "distillation": []} if teachers else {}
            self.generator = torch.Generator().manual_seed(seed)

        def forward(self, columns, labels=None):
            views = list(columns) * 2 if len(columns) == 1 else list(columns)
            # dict(): the encoder adds its outputs to the dictionary that it is given.
            z1, *z2 = (self.model(dict(view))["sentence_embedding"] for view in views)
            if text is None or not teachers:
                return self.loss(z1, torch.cat(z2))
            sentences = [text.rows[row][0] for row in labels.tolist()]
            embedded = [teacher(sentences) for teacher in teachers]
            output = self.loss(z1, torch.cat(z2), embedded, seed=self.generator)
            for name, values in self.parts.items():
                values.append(getattr(output, name))
            return output.loss

    return ColumnLoss()
