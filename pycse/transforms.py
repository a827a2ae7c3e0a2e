"""What torch.func and torch.fx put in a tensor's place, and how to tell."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.fx import Proxy

# Whether the caller runs inside a transform of torch.func.
active = torch._C._are_functorch_transforms_active


def _levels(t: Tensor):
    """t, and what it wraps, from the outermost transform inwards."""
    yield t
    while _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
        yield t


def tracked(t: Tensor) -> bool:
    """Whether some transform, or autograd below them, differentiates with respect to t."""
    return any(level.requires_grad for level in _levels(t))


def batched(t: Any) -> bool:
    """Whether t stands for a batch of tensors, under vmap: it has no values to look at."""
    return isinstance(t, Tensor) and any(_functorch.is_batchedtensor(level) for level in _levels(t))


def legacy_batched(t: Tensor) -> bool:
    """As ``batched``, of the vmap inside torch.autograd.functional and is_grads_batched."""
    return _functorch.is_legacy_batchedtensor(t)


class Symbolic(Exception):
    """Raised by validation where torch.fx.symbolic_trace passes a Proxy."""


def recordable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A public function as one node in the graphs of torch.fx.symbolic_trace, which cannot look into it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Symbolic:
            given = [y for x in (*args, *kwargs.values()) for y in (x if isinstance(x, (list, tuple)) else [x])]
            proxy = next(x for x in given if isinstance(x, Proxy))
            return proxy.tracer.create_proxy("call_function", call, args, kwargs)

    return call
