"""Heads and neurons: scores of the groups, and the cut itself, which leaves smaller dense layers.

    head    rows of query, key and value (weight and bias) and columns of the attention's output
    neuron  a row of the feed-forward part's first Linear (weight and bias) and a column of its second

The architectures are those of shrunk_encoders.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pycse.sparse.linear import SparseLinear
from pycse.sparse.storage import register

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Stack:
    """An encoder's layers, found in a module.

    Fields:
        model: the transformers model; `prefix` is its name in the module that was searched, with a dot behind.
        layers: (name below the model, layer).
    """

    model: Any
    prefix: str
    parts: Any
    layers: list[tuple[str, nn.Module]]

    def linears(self, granularity: str) -> list[str]:
        """Names of the Linear modules below a layer that lose rows; the last one loses columns."""
        p = self.parts
        return [p.query, p.key, p.value, p.output] if granularity == "head" else [p.up, p.down]

    def group_size(self, layer: nn.Module, granularity: str) -> int:
        """Rows of a group."""
        attention: Any = layer.get_submodule(self.parts.attention)
        return int(attention.attention_head_size) if granularity == "head" else 1


def find_stack(encoder: nn.Module, granularity: str) -> Stack:
    """The one encoder of a known architecture inside a module; ValueError naming what is supported."""
    try:
        from pycse.sparse.shrunk_encoders import SHRUNK
    except ImportError as error:
        raise ValueError(f"granularity {granularity!r} needs transformers: {error}") from error

    known = {model: parts for plain, (shrunk, _, parts) in SHRUNK.items() for model in (plain, shrunk)}
    found = [(name, module) for name, module in encoder.named_modules() if type(module) in known]
    if len(found) != 1:
        names = ", ".join(model.__name__ for model in SHRUNK)
        inside = ", ".join(dict.fromkeys(type(module).__name__ for _, module in found)) or type(encoder).__name__
        count = f"{len(found)} of them ({inside})" if found else f"a {inside} without one"
        raise ValueError(f"granularity {granularity!r} cuts an encoder that holds one of {names}; got {count}")
    name, model = found[0]
    parts = known[type(model)]
    stack: Any = model.get_submodule(parts.stack)
    layers = [(f"{parts.stack}.{i}", layer) for i, layer in enumerate(stack)]
    result = Stack(model, f"{name}." if name else "", parts, layers)
    owners = count_owners(encoder)
    for below, layer in layers:
        for linear in result.linears(granularity):
            name, module = f"{result.prefix}{below}.{linear}", layer.get_submodule(linear)
            if isinstance(module, SparseLinear):
                raise ValueError(
                    f"granularity {granularity!r} cuts dense layers, and {name} is sparse: cut heads and neurons "
                    f"first, or densify() it"
                )
            if type(module) is not nn.Linear:
                raise ValueError(
                    f"granularity {granularity!r} cuts plain nn.Linear, and {name} is a {type(module).__name__}"
                )
            if any(owners[id(p)] > 1 for p in module.parameters()):
                raise ValueError(
                    f"granularity {granularity!r} cuts each layer by itself, and parameters of {name} are used in more "
                    f"than one place"
                )
            if has_hooks(module):
                raise ValueError(
                    f"granularity {granularity!r} replaces layers, and {name} has hooks, which would be lost: remove "
                    f"them first"
                )
    return result


def count_owners(encoder: nn.Module) -> dict[int, int]:
    """id of a parameter -> in how many places of the encoder it is."""
    owners: dict[int, int] = {}
    for _, module in encoder.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    return owners


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in HOOKS)


def group_scores(stack: Stack, scores: dict[str, Tensor], granularity: str) -> list[Tensor]:
    """For every layer the mean score of each of its heads or neurons, biases included."""
    result = []
    for below, layer in stack.layers:
        size = stack.group_size(layer, granularity)
        total: Any = 0
        members = 0
        *rows, columns = (f"{stack.prefix}{below}.{name}" for name in stack.linears(granularity))
        for name in rows:
            for part in ("weight", "bias"):
                score = scores.get(f"{name}.{part}")
                if score is not None:
                    total = total + score.reshape(score.shape[0] // size, -1).sum(1)
                    members += score[:size].numel()
        score = scores[f"{columns}.weight"]
        total = total + score.reshape(score.shape[0], -1, size).sum((0, 2))
        members += score.shape[0] * size
        result.append(total / members)
    return result


def shrink(stack: Stack, kept: list[Tensor], granularity: str) -> None:
    """Cut every layer down to its kept groups (bool, one entry a group), in place.

    Neurons that are equally many in every layer are what the configuration's own entry says; anything else makes the
    model one of shrunk_encoders.py.
    """
    from pycse.sparse.shrunk_encoders import SHRUNK, count_heads

    model, config, parts = stack.model, stack.model.config, stack.parts
    for (_, layer), keep in zip(stack.layers, kept):
        size = stack.group_size(layer, granularity)
        index = keep.repeat_interleave(size).nonzero().squeeze(1)
        *rows, columns = stack.linears(granularity)
        for name in rows:
            take(layer, name, index, 0)
        take(layer, columns, index, 1)
    heads, neurons = getattr(config, "shrunk_heads", None), getattr(config, "shrunk_neurons", None)
    if granularity == "head":
        before = heads or [list(range(len(keep))) for keep in kept]
        heads = [[head for head, stays in zip(old, keep.tolist()) if stays] for old, keep in zip(before, kept)]
        for (_, layer), now in zip(stack.layers, heads):
            count_heads(layer.get_submodule(parts.attention), parts, now)
    else:
        neurons = [int(keep.sum()) for keep in kept]
        if len(set(neurons)) == 1:
            setattr(config, parts.neurons, neurons[0])
            neurons = None
    if heads is None and neurons is None and type(model) in SHRUNK:
        return
    if type(model) in SHRUNK:
        model.__class__, config_class, _ = SHRUNK[type(model)]
        config.__class__ = config_class
        config.model_type = config_class.model_type
    config.shrunk_heads, config.shrunk_neurons = heads, neurons
    register()


def take(layer: nn.Module, name: str, index: Tensor, dim: int) -> None:
    """Put a smaller Linear in the place of one: only these rows (dim 0, bias as well) or columns (dim 1)."""
    old: Any = layer.get_submodule(name)
    weight = old.weight.detach().index_select(dim, index)
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None, device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    if old.bias is not None:
        bias = old.bias.detach()
        bias = bias.index_select(0, index) if dim == 0 else bias.clone()
        new.bias = nn.Parameter(bias, requires_grad=old.bias.requires_grad)
    new.train(old.training)
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, new)
