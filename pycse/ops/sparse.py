"""pycse::sparse_linear and pycse::masked_linear, and their two backward products as operators of their own.

    y = x (W ⊙ M)ᵀ + b,    dX = dY (W ⊙ M),    dW = (dYᵀ X) ⊙ M

Backward keeps x and W, never W ⊙ M. The three products are each other's derivatives, so gradients of any order work.

Kernels take plain tensors. Where something else looks through an operator (torch.func's transforms, vmap over a
backward pass, forward-mode AD), the product is written in PyTorch's own operators, dense, with W ⊙ M in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pycse import backends, transforms
from pycse.ops.fused import library
from pycse.pattern import Pattern, unpack_mask

_INDEX = "Tensor ptr, Tensor cols, Tensor t_ptr, Tensor t_rows, Tensor plan, Tensor t_plan, int block, str backend"
_BITS = "Tensor bits, str backend"
_PLAIN = (Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work, neither of which sees into a kernel."""
    return forward_ad._current_level >= 0 or transforms.active()


def traced() -> bool:
    """Whether torch.jit.trace records, as it does for the ONNX export without dynamo."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def _rows(z: Tensor) -> Tensor:
    """z with unit stride along features."""
    return z if z.stride(1) == 1 and z.stride(0) >= z.shape[1] else z.contiguous()


def _run(backend: str, like: Tensor, name: str) -> Callable[..., Tensor]:
    return getattr(backends.module(backend, like.device.type, "sparse"), name)


def pattern_of(mask: Tensor, block: int = 1) -> Pattern:
    """The pattern of a bool mask (out, in), with all that kernels of its device read. Errors as Pattern.from_mask."""
    pattern = Pattern.from_mask(mask, block)
    if mask.device.type == "cpu" and backends.unusable("cpu") is None:
        backends.module("cpu", "cpu", "sparse").plan(pattern)
    return pattern


def _pattern(out: int, in_: int, index: tuple[Any, ...]) -> tuple[Pattern, str]:
    *tensors, block, backend = index
    return Pattern((out, in_), block, *tensors), backend


def _sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *index: Any, pattern: Pattern | None = None
) -> Tensor:
    if pattern is None:
        pattern, _ = _pattern(weight.shape[0], weight.shape[1], index)
    return _run(index[-1], x, "linear")(_rows(x), _rows(weight), bias, pattern)


def packed(weight: Tensor, *index: Any) -> Pattern:
    """The pattern of an index, with all that the backend can make of a weight that stays as it is."""
    pattern, backend = _pattern(weight.shape[0], weight.shape[1], index)
    pack = getattr(backends.module(backend, weight.device.type, "sparse"), "pack", None)
    if pack is not None:
        pack(_rows(weight), pattern)
    return pattern


def _sparse_linear_dx(dy: Tensor, weight: Tensor, *index: Any) -> Tensor:
    pattern, backend = _pattern(weight.shape[0], weight.shape[1], index)
    return _run(backend, dy, "dx")(_rows(dy), _rows(weight), pattern)


def _sparse_linear_dw(dy: Tensor, x: Tensor, *index: Any) -> Tensor:
    pattern, backend = _pattern(dy.shape[1], x.shape[1], index)
    return _run(backend, dy, "dw")(_rows(dy), _rows(x), pattern)


def _index_mask(out: int, in_: int, *index: Any) -> Tensor:
    return _pattern(out, in_, index)[0].mask()


def _masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, backend: str) -> Tensor:
    return _run(backend, x, "masked")(_rows(x), _rows(weight), bits.contiguous(), bias)


def _masked_linear_dx(dy: Tensor, weight: Tensor, bits: Tensor, backend: str) -> Tensor:
    return _run(backend, dy, "masked_dx")(_rows(dy), _rows(weight), bits.contiguous())


def _masked_linear_dw(dy: Tensor, x: Tensor, bits: Tensor, backend: str) -> Tensor:
    return _run(backend, dy, "masked_dw")(_rows(dy), _rows(x), bits.contiguous())


def _bits_mask(out: int, in_: int, bits: Tensor, backend: str) -> Tensor:
    return unpack_mask(bits, in_)


class _Product:
    """One operator: ``kernel`` computes it, ``dense`` says the same in PyTorch's operators, and ``backward`` gives the
    gradients of its first ``tensors`` arguments, of which the last may be None."""

    def __init__(self, schema: str, kernel: Any, dense: Any, backward: Any, fake: Any, tensors: int) -> None:
        name = schema.split("(")[0]
        self.kernel, self.dense, self.backward, self.tensors = kernel, dense, backward, tensors
        library.define(schema)
        self.op = getattr(torch.ops.pycse, name).default
        library.impl(name, kernel, "CompositeExplicitAutograd")
        library.impl(name, self._autograd, "Autograd")
        for vmap in ("FuncTorchBatched", "Batched"):
            library.impl(name, dense, vmap)
        torch.library.register_fake(f"pycse::{name}", fake, lib=library)

    def __call__(self, *args: Any, **known: Any) -> Tensor:
        """The operator; plain eager tensors skip the dispatcher, which costs more than small products.

        ``known`` is what the caller has made of the weight before, and spares that.
        """
        if torch.compiler.is_compiling() or not self._plain(args):
            return self.op(*args)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[: self.tensors]):
            return _Gradients.apply(self, self.kernel, *args)
        return self.kernel(*args, **known)

    def _plain(self, args: tuple[Any, ...]) -> bool:
        """Whether nothing is left for the dispatcher to do: memory holds the values, and nobody looks on."""
        return (
            all(map(_is_plain, args[: self.tensors + 1]))
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch.is_autocast_enabled(args[0].device.type)
            and not transformed()
            and not traced()
        )

    def _below_autograd(self, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*args)

    def _autograd(self, *args: Any) -> Tensor:
        if transformed():
            return self.dense(*args)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[: self.tensors]):
            return _Gradients.apply(self, self._below_autograd, *args)
        return self._below_autograd(*args)


class _Gradients(torch.autograd.Function):
    """Arguments: the product, what computes it (its operator, or in eager mode its kernel), and the operator's."""

    @staticmethod
    def forward(ctx: Any, product: _Product, run: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(args[0], args[1], *(t for t in args[product.tensors :] if isinstance(t, Tensor)))
        ctx.options = tuple(t for t in args[product.tensors :] if not isinstance(t, Tensor))
        ctx.product = product
        return run(*args)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *which = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
        which += ctx.options
        needs = ctx.needs_input_grad[2 : 2 + ctx.product.tensors]
        device = g.device.type
        # Forward has cast already; products inside a kernel are not to be cast again.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
            gradients = ctx.product.backward(g, a, b, which, needs)
        return None, None, *gradients, *[None] * len(which)


class _Products:
    """y with its gradients, and those with theirs. ``which`` names the kept weights, ``mask`` makes M of it."""

    def __init__(self, name: str, which: str, forward: Any, dx: Any, dw: Any, mask: Any) -> None:
        def kept(weight: Tensor, which: tuple[Any, ...]) -> Tensor:
            return weight.masked_fill(~mask(weight.shape[0], weight.shape[1], *which), 0)

        self.y = _Product(
            f"{name}(Tensor x, Tensor weight, Tensor? bias, {which}) -> Tensor",
            forward,
            lambda x, weight, bias, *which: F.linear(x, kept(weight, which), bias),
            self._of_y,
            lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
            3,
        )
        self.dx = _Product(
            f"{name}_dx(Tensor dy, Tensor weight, {which}) -> Tensor",
            dx,
            lambda dy, weight, *which: dy @ kept(weight, which),
            self._of_dx,
            lambda dy, weight, *_: dy.new_empty(dy.shape[0], weight.shape[1]),
            2,
        )
        self.dw = _Product(
            f"{name}_dw(Tensor dy, Tensor x, {which}) -> Tensor",
            dw,
            lambda dy, x, *which: kept(dy.t() @ x, which),
            self._of_dw,
            lambda dy, x, *_: dy.new_empty(dy.shape[1], x.shape[1]),
            2,
        )
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            library.impl(name, self._autocast(device, getattr(torch._C.DispatchKey, key)), key)

    def __call__(self, *args: Any, **known: Any) -> Tensor:
        return self.y(*args, **known)

    def _of_y(self, dy: Tensor, x: Tensor, weight: Tensor, which: Any, needs: Any) -> tuple[Tensor | None, ...]:
        return (
            self.dx(dy, weight, *which) if needs[0] else None,
            self.dw(dy, x, *which) if needs[1] else None,
            dy.sum(0) if needs[2] else None,
        )

    def _of_dx(self, g: Tensor, dy: Tensor, weight: Tensor, which: Any, needs: Any) -> tuple[Tensor | None, ...]:
        return (
            self.y(g, weight, None, *which) if needs[0] else None,
            self.dw(dy, g, *which) if needs[1] else None,
        )

    def _of_dw(self, g: Tensor, dy: Tensor, x: Tensor, which: Any, needs: Any) -> tuple[Tensor | None, ...]:
        return (
            self.y(x, g, None, *which) if needs[0] else None,
            self.dx(dy, g, *which) if needs[1] else None,
        )

    def _autocast(self, device: str, key: torch._C.DispatchKey) -> Any:
        """x, W and b in autocast's type, as F.linear has them."""
        keys = torch._C.DispatchKeySet(key)

        def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *which: Any) -> Tensor:
            dtype = torch.get_autocast_dtype(device)
            cast = lambda t: t if t is None or t.dtype == torch.float64 else t.to(dtype)  # noqa: E731
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.y.op(cast(x), cast(weight), cast(bias), *which)

        return kernel


def _is_plain(t: Tensor | None) -> bool:
    """Whether the memory at t's address holds its values."""
    return t is None or (
        type(t) in _PLAIN
        and not t.is_neg()
        and not t._is_zerotensor()
        and not t.is_meta
        and not transforms.legacy_batched(t)  # of autograd.grad(is_grads_batched=True)
    )


sparse_linear = _Products("sparse_linear", _INDEX, _sparse_linear, _sparse_linear_dx, _sparse_linear_dw, _index_mask)
masked_linear = _Products("masked_linear", _BITS, _masked_linear, _masked_linear_dx, _masked_linear_dw, _bits_mask)
