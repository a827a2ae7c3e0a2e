"""Encoders whose layers have fewer heads or neurons than the configuration of their architecture can say.

This file is copied into the folder of a saved model, where `trust_remote_code=True` finds it: it imports nothing of
pycse.

A shrunk encoder is a subclass of its architecture's model. Its configuration has two more entries and a model type of
its own, so that a loader that does not know it stops with an error instead of making up weights:

    shrunk_heads     kept heads of every layer, by their number before; None: all
    shrunk_neurons   number of neurons of every layer's feed-forward part; None: as the configuration says
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention


@dataclass(frozen=True)
class Architecture:
    """Where an encoder keeps its parts: `stack` is below the model, the others below each layer of the stack.

    Fields:
        attention: the module that counts heads, in its attribute `count` (and in all_head_size, where it has one).
        neurons: the configuration's name for the size of the feed-forward part.
    """

    stack: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    count: str = "num_attention_heads"
    neurons: str = "intermediate_size"


BERT = Architecture(
    "encoder.layer", "attention.self", "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
MPNET = Architecture(
    "encoder.layer", "attention.attn", "attention.attn.q", "attention.attn.k", "attention.attn.v",
    "attention.attn.o", "intermediate.dense", "output.dense",
)  # fmt: skip
DISTILBERT = Architecture(
    "transformer.layer", "attention", "attention.q_lin", "attention.k_lin", "attention.v_lin",
    "attention.out_lin", "ffn.lin1", "ffn.lin2", count="n_heads", neurons="hidden_dim",
)  # fmt: skip


class ShrunkBertConfig(BertConfig):
    model_type = "pycse_shrunk_bert"
    shrunk_heads: Any = None
    shrunk_neurons: Any = None


class ShrunkRobertaConfig(RobertaConfig):
    model_type = "pycse_shrunk_roberta"
    shrunk_heads: Any = None
    shrunk_neurons: Any = None


class ShrunkXLMRobertaConfig(XLMRobertaConfig):
    model_type = "pycse_shrunk_xlm_roberta"
    shrunk_heads: Any = None
    shrunk_neurons: Any = None


class ShrunkMPNetConfig(MPNetConfig):
    model_type = "pycse_shrunk_mpnet"
    shrunk_heads: Any = None
    shrunk_neurons: Any = None


class ShrunkDistilBertConfig(DistilBertConfig):
    model_type = "pycse_shrunk_distilbert"
    shrunk_heads: Any = None
    shrunk_neurons: Any = None


class ShrunkBertModel(BertModel):
    config_class = ShrunkBertConfig

    def __init__(self, config, *arguments, **options):
        super().__init__(config, *arguments, **options)
        resize(self, BERT)


class ShrunkRobertaModel(RobertaModel):
    config_class = ShrunkRobertaConfig

    def __init__(self, config, *arguments, **options):
        super().__init__(config, *arguments, **options)
        resize(self, BERT)


class ShrunkXLMRobertaModel(XLMRobertaModel):
    config_class = ShrunkXLMRobertaConfig

    def __init__(self, config, *arguments, **options):
        super().__init__(config, *arguments, **options)
        resize(self, BERT)


class ShrunkMPNetModel(MPNetModel):
    config_class = ShrunkMPNetConfig

    def __init__(self, config, *arguments, **options):
        super().__init__(config, *arguments, **options)
        resize(self, MPNET)


class ShrunkDistilBertModel(DistilBertModel):
    config_class = ShrunkDistilBertConfig

    def __init__(self, config, *arguments, **options):
        super().__init__(config, *arguments, **options)
        resize(self, DISTILBERT)


class ShrunkMPNetSelfAttention(MPNetSelfAttention):
    """MPNet's position bias has a row for every head of the configuration; this attention takes those of its own
    heads."""

    kept_heads: list[int]

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        if position_bias is not None:
            position_bias = position_bias[:, self.kept_heads]
        return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)


# Class as transformers has it -> (shrunk class, its configuration, where its parts are)
SHRUNK: dict[Any, tuple[Any, Any, Architecture]] = {
    BertModel: (ShrunkBertModel, ShrunkBertConfig, BERT),
    RobertaModel: (ShrunkRobertaModel, ShrunkRobertaConfig, BERT),
    XLMRobertaModel: (ShrunkXLMRobertaModel, ShrunkXLMRobertaConfig, BERT),
    MPNetModel: (ShrunkMPNetModel, ShrunkMPNetConfig, MPNET),
    DistilBertModel: (ShrunkDistilBertModel, ShrunkDistilBertConfig, DISTILBERT),
}

# The saved configuration then names this file and its classes.
for _model, _config, _ in SHRUNK.values():
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")


def check_sizes(config: Any, layers: int, parts: Architecture) -> None:
    """Raise ValueError unless what is left of each layer is a part of what the configuration says: its numbers become
    sizes of tensors, and places in them."""
    heads, neurons = config.num_attention_heads, getattr(config, parts.neurons)
    for name in ("shrunk_heads", "shrunk_neurons"):
        given = getattr(config, name)
        if given is None:
            continue
        if not (isinstance(given, (list, tuple)) and len(given) == layers and all(given)):
            raise ValueError(
                f"{name} in the configuration must be a list of what is left of each of {layers} layers, "
                f"got {given!r:.80}"
            )
        for one in given:
            if name == "shrunk_neurons":
                fits = type(one) is int and 0 < one <= neurons
                allowed = f"numbers up to {neurons}"
            else:
                fits = isinstance(one, (list, tuple)) and all(type(k) is int and 0 <= k < heads for k in one)
                fits = fits and len(set(one)) == len(one)
                allowed = f"lists of different heads below {heads}"
            if not fits:
                raise ValueError(f"{name} in the configuration must hold {allowed}, got {one!r:.80}")


def resize(model: nn.Module, parts: Architecture) -> None:
    """Give every layer new Linear modules of the sizes that the configuration asks for."""
    config: Any = model.config
    layers: Any = model.get_submodule(parts.stack)
    check_sizes(config, len(layers), parts)
    for i, layer in enumerate(layers):
        attention = layer.get_submodule(parts.attention)
        size = attention.attention_head_size
        if config.shrunk_heads is not None:
            kept = config.shrunk_heads[i]
            for name in (parts.query, parts.key, parts.value):
                replace(layer, name, out_features=len(kept) * size)
            replace(layer, parts.output, in_features=len(kept) * size)
            count_heads(attention, parts, kept)
        if config.shrunk_neurons is not None:
            replace(layer, parts.up, out_features=config.shrunk_neurons[i])
            replace(layer, parts.down, in_features=config.shrunk_neurons[i])


def replace(layer: nn.Module, name: str, **sizes: int) -> None:
    """Put a new Linear in the place of one, with some of its sizes changed."""
    old: Any = layer.get_submodule(name)
    sizes = {"in_features": old.in_features, "out_features": old.out_features} | sizes
    new = nn.Linear(**sizes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, new)


def count_heads(attention: Any, parts: Architecture, kept: list[int]) -> None:
    """Tell an attention module how many heads it has left, and which."""
    setattr(attention, parts.count, len(kept))
    if hasattr(attention, "all_head_size"):
        attention.all_head_size = len(kept) * attention.attention_head_size
    if isinstance(attention, MPNetSelfAttention):
        attention.__class__ = ShrunkMPNetSelfAttention
        attention.kept_heads = list(kept)  # type: ignore[assignment]
