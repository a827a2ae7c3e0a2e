"""Heads that an encoder has while it is trained, and no longer when it is saved or evaluated.

    mlp   z = tanh(W h + b),  h (D) the pooled embedding,  W (D, D)

SimCSE trains so without labels (--mlp_only_train): of the form of BERT's own pooler, but new, W ~ N(0, 0.02^2) and
b = 0; BERT's pooler itself is not used. The loss sees z, everybody else h.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pycse.training.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

NAME = "head"  # among the encoder's modules; those that stay have numbers
STD = 0.02  # BERT's initializer_range


class TrainingHead(nn.Module):
    """A layer on top of the pooled embeddings in training mode, and nothing in evaluation mode.

    Args:
        width: D.
        dtype, device: of the encoder.
    """

    def __init__(self, width: int, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__()
        self.dense = nn.Linear(width, width, dtype=dtype, device=device)
        nn.init.normal_(self.dense.weight, std=STD)
        nn.init.zeros_(self.dense.bias)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        if self.training:
            features["sentence_embedding"] = torch.tanh(self.dense(features["sentence_embedding"]))
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """For checkpoints. A model for others is saved without its head (`without_head`)."""
        from safetensors.torch import save_model

        save_model(self, str(Path(output_path) / "model.safetensors"))


def add_head(encoder: SentenceTransformer, kind: str | None) -> None:
    """Put a new head of this kind behind the pooling, in place; None adds none. Draws from torch's generator."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    if kind is None:
        return
    modules = list(encoder.named_children())
    at = next((k for k, (_, module) in enumerate(modules) if isinstance(module, Pooling)), None)
    if at is None:
        raise UserError(f"--head {kind}: this model pools no tokens; leave --head out")
    pooling: Any = modules[at][1]
    like = next(encoder.parameters())
    head = TrainingHead(pooling.get_embedding_dimension(), like.dtype, like.device)
    head.train(encoder.training)
    modules.insert(at + 1, (NAME, head))
    put(encoder, modules)


def remove_head(encoder: SentenceTransformer) -> Any:
    """Take the head off again, in place; the head, or None where there was none."""
    modules = list(encoder.named_children())
    head = dict(modules).get(NAME)
    put(encoder, [(name, module) for name, module in modules if name != NAME])
    return head


@contextmanager
def without_head(encoder: SentenceTransformer) -> Iterator[Any]:
    """The encoder as it is saved, and afterwards again as it is trained; the head, or None where it has none."""
    modules = list(encoder.named_children())
    try:
        yield remove_head(encoder)
    finally:
        put(encoder, modules)


def put(encoder: SentenceTransformer, modules: list[tuple[str, nn.Module]]) -> None:
    encoder._modules.clear()
    encoder._modules.update(modules)
