"""pycse::sparse_linear and pycse::masked_linear, and their two backward products as operators of their own.

    y = x (W ⊙ M)ᵀ + b,    dX = dY (W ⊙ M),    dW = (dYᵀ X) ⊙ M

Backward keeps x and W, never W ⊙ M. The three products are each other's derivatives, so gradients of any order work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycse import backends
from pycse.ops.fused import library
from pycse.sparse.pattern import Pattern

_INDEX = "Tensor ptr, Tensor cols, Tensor t_ptr, Tensor t_rows, Tensor plan, Tensor t_plan, int block, str backend"
_BITS = "Tensor bits, str backend"
_PLAIN = (Tensor, torch.nn.Parameter)


def _rows(z: Tensor) -> Tensor:
    """z with unit stride along features."""
    return z if z.stride(1) == 1 and z.stride(0) >= z.shape[1] else z.contiguous()


def _run(backend: str, like: Tensor, name: str) -> Callable[..., Tensor]:
    return getattr(backends.module(backend, like.device.type, "sparse"), name)


def _sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *index: Any, pattern: Pattern | None = None
) -> Tensor:
    *tensors, block, backend = index
    pattern = pattern or Pattern((weight.shape[0], weight.shape[1]), block, *tensors)
    return _run(backend, x, "linear")(_rows(x), _rows(weight), bias, pattern)


def packed(weight: Tensor, *index: Any) -> Pattern:
    """The pattern of an index, with all that the backend can make of a weight that stays as it is."""
    *tensors, block, backend = index
    pattern = Pattern((weight.shape[0], weight.shape[1]), block, *tensors)
    pack = getattr(backends.module(backend, weight.device.type, "sparse"), "pack", None)
    if pack is not None:
        pack(_rows(weight), pattern)
    return pattern


def _sparse_linear_dx(dy: Tensor, weight: Tensor, *index: Any) -> Tensor:
    *tensors, block, backend = index
    pattern = Pattern((weight.shape[0], weight.shape[1]), block, *tensors)
    return _run(backend, dy, "dx")(_rows(dy), _rows(weight), pattern)


def _sparse_linear_dw(dy: Tensor, x: Tensor, *index: Any) -> Tensor:
    *tensors, block, backend = index
    return _run(backend, dy, "dw")(_rows(dy), _rows(x), Pattern((dy.shape[1], x.shape[1]), block, *tensors))


def _masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, backend: str) -> Tensor:
    return _run(backend, x, "masked")(_rows(x), _rows(weight), bits.contiguous(), bias)


def _masked_linear_dx(dy: Tensor, weight: Tensor, bits: Tensor, backend: str) -> Tensor:
    return _run(backend, dy, "masked_dx")(_rows(dy), _rows(weight), bits.contiguous())


def _masked_linear_dw(dy: Tensor, x: Tensor, bits: Tensor, backend: str) -> Tensor:
    return _run(backend, dy, "masked_dw")(_rows(dy), _rows(x), bits.contiguous())


class _Products:
    """The forward product with its gradients, and those with theirs. ``which`` names the kept weights."""

    def __init__(self, name: str, which: str, forward: Any, dx: Any, dw: Any) -> None:
        self.forward = forward
        self.op = self._define(name, f"(Tensor x, Tensor weight, Tensor? bias, {which}) -> Tensor", forward)
        self.dx = self._define(f"{name}_dx", f"(Tensor dy, Tensor weight, {which}) -> Tensor", dx)
        self.dw = self._define(f"{name}_dw", f"(Tensor dy, Tensor x, {which}) -> Tensor", dw)
        torch.library.register_fake(
            f"pycse::{name}", lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]), lib=library
        )
        torch.library.register_fake(
            f"pycse::{name}_dx", lambda dy, weight, *_: dy.new_empty(dy.shape[0], weight.shape[1]), lib=library
        )
        torch.library.register_fake(
            f"pycse::{name}_dw", lambda dy, x, *_: dy.new_empty(dy.shape[1], x.shape[1]), lib=library
        )
        for suffix, backward, save in (
            ("", self._of_y, _save_linear), ("_dx", self._of_dx, _save_product), ("_dw", self._of_dw, _save_product),
        ):  # fmt: skip
            torch.library.register_autograd(f"pycse::{name}{suffix}", backward, setup_context=save, lib=library)
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            library.impl(name, self._autocast(device, getattr(torch._C.DispatchKey, key)), key)

    def _define(self, name: str, schema: str, implementation: Any) -> Any:
        library.define(name + schema)
        library.impl(name, implementation, "CompositeExplicitAutograd")
        return getattr(torch.ops.pycse, name).default

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, *which: Any, **known: Any) -> Tensor:
        """The operator; without gradients, plain eager tensors skip the dispatcher, which costs more than small products.

        ``known`` is what the caller has made of the weight before, and spares that.
        """
        plain = (
            not torch.compiler.is_compiling()
            and type(x) in _PLAIN
            and type(weight) in _PLAIN
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch.is_autocast_enabled(x.device.type)
            and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        )
        return self.forward(x, weight, bias, *which, **known) if plain else self.op(x, weight, bias, *which)

    def _of_y(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *which = _saved(ctx)
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        return (
            self.dx(dy, weight, *which) if need_x else None,
            self.dw(dy, x, *which) if need_w else None,
            dy.sum(0) if need_b else None,
            *[None] * len(which),
        )

    def _of_dx(self, ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dy, weight, *which = _saved(ctx)
        need_dy, need_w = ctx.needs_input_grad[:2]
        return (
            self.op(g, weight, None, *which) if need_dy else None,
            self.dw(dy, g, *which) if need_w else None,
            *[None] * len(which),
        )

    def _of_dw(self, ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, *which = _saved(ctx)
        need_dy, need_x = ctx.needs_input_grad[:2]
        return (
            self.op(x, g, None, *which) if need_dy else None,
            self.dx(dy, g, *which) if need_x else None,
            *[None] * len(which),
        )

    def _autocast(self, device: str, key: torch._C.DispatchKey) -> Any:
        """x, W and b in autocast's type, as F.linear has them."""
        keys = torch._C.DispatchKeySet(key)

        def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *which: Any) -> Tensor:
            dtype = torch.get_autocast_dtype(device)
            cast = lambda t: t if t is None or t.dtype == torch.float64 else t.to(dtype)  # noqa: E731
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.op(cast(x), cast(weight), cast(bias), *which)

        return kernel


def _save(ctx: Any, a: Tensor, b: Tensor, which: tuple[Any, ...]) -> None:
    ctx.save_for_backward(a, b, *(t for t in which if isinstance(t, Tensor)))
    ctx.options = tuple(t for t in which if not isinstance(t, Tensor))


def _saved(ctx: Any) -> tuple[Any, ...]:
    return ctx.saved_tensors + ctx.options  # once: activation checkpointing unpacks them a single time


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *which = inputs
    _save(ctx, x, weight, tuple(which))


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs[0], inputs[1], inputs[2:])


sparse_linear = _Products("sparse_linear", _INDEX, _sparse_linear, _sparse_linear_dx, _sparse_linear_dw)
masked_linear = _Products("masked_linear", _BITS, _masked_linear, _masked_linear_dx, _masked_linear_dw)
