"""How an encoder's tokens become one embedding, as the papers choose it.

    cls         the first token's, last layer
    mean        mean of the tokens', last layer
    first-last  mean of the tokens', mean of the first and the last layer (avg_first_last of SimCSE)

All are modules of sentence-transformers, which loads the saved model without pycse. first-last is its
WeightedLayerPooling over the outputs of layers 1 to L, with the weights 1, 0, ..., 0, 1 that are not trained here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from pycse.training.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def set_pooling(encoder: SentenceTransformer, kind: str | None) -> None:
    """Give an encoder this pooling, in place, after its layers are chosen; None leaves it as it is.

    Raises:
        UserError: an encoder without tokens' embeddings, without a pooling to replace, or with another module that
            changes the tokens' embeddings before it: that belongs to the pooling it was trained with.
    """
    import torch
    from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling

    if kind is None:
        return
    first: Any = encoder[0]
    backbone = getattr(first, "auto_model", None)
    own = list(encoder)
    at = next((k for k, module in enumerate(own) if isinstance(module, Pooling)), None)
    if backbone is None or at is None or first.module_output_name != "token_embeddings":
        raise UserError(f"--pooling {kind}: this model has no pooling of tokens to replace; leave --pooling out")
    between = [type(m).__name__ for m in own[1:at] if not isinstance(m, WeightedLayerPooling)]
    if between:
        raise UserError(
            f"--pooling {kind}: this model has {', '.join(between)} between its transformer and its pooling; leave "
            "--pooling out"
        )
    width = first.get_embedding_dimension()
    layers: Any = None
    if kind == "first-last":
        count = backbone.config.num_hidden_layers
        weights = torch.zeros(count, dtype=torch.float32, device=encoder.device)
        weights[0] = weights[-1] = 1.0
        layers = WeightedLayerPooling(width, count, 1, torch.nn.Parameter(weights, requires_grad=False))
    # Kept in the configuration: the transformer then hands out what every layer put out, also when it is loaded.
    backbone.config.output_hidden_states = layers is not None
    old: Any = own[at]
    new = Pooling(width, "cls" if kind == "cls" else "mean", include_prompt=old.include_prompt)
    modules = [m for m in own if not isinstance(m, (Pooling, WeightedLayerPooling))]
    replace_modules(encoder, [first, *([layers] if layers is not None else []), new, *modules[1:]])


def replace_modules(encoder: SentenceTransformer, modules: list[Any]) -> None:
    """Put these modules in the place of an encoder's own, under the numbers that it saves them by."""
    kept = {id(module): name for name, module in encoder.named_children()}
    options = encoder.module_kwargs or {}
    chosen = {str(k): options[name] for k, m in enumerate(modules) if (name := kept.get(id(m))) in options}
    encoder.module_kwargs = OrderedDict(chosen)
    encoder._modules = OrderedDict((str(k), module) for k, module in enumerate(modules))  # type: ignore[assignment]


def is_first_last(encoder: SentenceTransformer) -> bool:
    """Whether an encoder pools its first and last layer; UserError where it weighs its layers in another way."""
    weights = layer_weights(encoder)
    if weights is None:
        return False
    values = weights.tolist()
    if values[0] != values[-1] or any(values[1:-1]):
        raise UserError("--layers: this model weighs each of its layers (WeightedLayerPooling); use --layers all")
    return True


def freeze_layer_weights(encoder: SentenceTransformer) -> None:
    """The weights of first-last are no parameters, but sentence-transformers loads them as such."""
    weights = layer_weights(encoder)
    if weights is not None and weights[0] == weights[-1] and not weights[1:-1].any():
        weights.requires_grad_(False)


def layer_weights(encoder: SentenceTransformer) -> Any:
    from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling

    return next((module.layer_weights for module in encoder if isinstance(module, WeightedLayerPooling)), None)
