"""How a batch becomes embeddings, for every kind of encoder, and which pairs of its texts are positives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Pooling = Callable[[Any, Any], Tensor]


def is_a(module: nn.Module, package: str, name: str) -> bool:
    """isinstance of a class of a package, without importing what nobody has imported."""
    loaded = sys.modules.get(package)
    return loaded is not None and isinstance(module, getattr(loaded, name))


def is_sentence_transformer(module: nn.Module) -> bool:
    return is_a(module, "sentence_transformers", "SentenceTransformer")


def is_pretrained(module: nn.Module) -> bool:
    return is_a(module, "transformers", "PreTrainedModel")


def mean_pooling(output: Any, batch: Any) -> Tensor:
    """Mean of the last hidden states under the attention mask, as sentence-transformers takes it."""
    hidden = output.last_hidden_state
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return hidden.mean(1)
    mask = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def is_text(batch: Any) -> bool:
    return isinstance(batch, Sequence) and not isinstance(batch, str) and all(isinstance(text, str) for text in batch)


def halves(batch: Any) -> tuple[Any, Any]:
    """(a batch, its positives or None). A pair is a tuple or list of two batches; sentences in a list are one batch."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and not is_text(batch):
        return batch[0], batch[1]
    return batch, None


def embedder(encoder: nn.Module, pooling: Pooling | None) -> Callable[[Any], Tensor]:
    """A function from a batch to its embeddings (B, D), with gradient.

    Raises:
        TypeError: the encoder is no module, or needs a pooling function.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    whole = is_sentence_transformer(encoder)
    if pooling is None and not whole and not is_pretrained(encoder):
        raise TypeError(
            f"pooling must be given for a {type(encoder).__name__}: a function (output, batch) -> embeddings (B, D)"
        )
    if pooling is not None and not callable(pooling):
        raise TypeError(
            f"pooling must be a function (output, batch) -> embeddings (B, D), got {type(pooling).__name__}"
        )
    pool: Pooling = pooling or mean_pooling
    device = next((p.device for p in encoder.parameters()), None)

    def moved(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return {name: moved(value) for name, value in batch.items()}
        if not isinstance(batch, Tensor):
            return batch
        batch = batch.to(device)
        return batch.clone() if batch.is_inference() else batch  # autograd cannot save those

    def embed(batch: Any) -> Tensor:
        if is_text(batch):
            if not whole:
                raise TypeError(
                    f"batches must be tokenized for a {type(encoder).__name__} (tensors, or a mapping of tensors); "
                    f"sentences are for a SentenceTransformer"
                )
            batch = encoder.preprocess(list(batch))  # type: ignore[operator]
        batch = moved(batch)
        if whole and not isinstance(batch, Mapping):
            raise TypeError(
                f"batches must hold lists of sentences or mappings of tensors for a SentenceTransformer, got a "
                f"{type(batch).__name__}"
            )
        if is_pretrained(encoder) and not isinstance(batch, (Mapping, Tensor)):
            raise TypeError(
                f"batches must hold tensors, mappings of tensors, or pairs of them for a {type(encoder).__name__}, "
                f"got a {type(batch).__name__}"
            )
        if whole:
            output = encoder(dict(batch))  # the encoder adds its outputs to the mapping that it is given
            z = output["sentence_embedding"] if pooling is None else pooling(output, batch)
        else:
            z = pool(encoder(**batch) if isinstance(batch, Mapping) else encoder(batch), batch)
        if not isinstance(z, Tensor) or z.dim() != 2:
            got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"pooling must give embeddings (B, D), got {got}")
        return z

    return embed
