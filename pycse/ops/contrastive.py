"""pycse::contrastive: the loss, and in the same pass the gradients that will be needed.

The op returns (loss, dz1, dz2, dtemperature, dm, dweight); what ``needs`` leaves out is an empty tensor. Gradients of
float16 inputs stay float32 until they are multiplied by the upstream gradient, so that loss scaling works.

Autograd keeps the gradients made in forward and gives them away in the first backward: no copy, and no memory beyond the
gradients themselves. A second backward (retain_graph) and reduction="none", whose upstream gradient forward does not know,
compute them again through the same op.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pycse import backends
from pycse.problem import Contrastive, Needs
from pycse.validation import check_values

_library = torch.library.Library("pycse", "DEF")
_library.define(
    "contrastive(Tensor z1, Tensor z2, Tensor? temperature, Tensor? m, Tensor? weight, Tensor? positives, "
    "Tensor? query_ids, Tensor? key_ids, float temperature_value, float m_value, bool focal, float hard_negative_weight, "
    "float? exclude_above, bool symmetric, bool normalize, str reduction, str backend, bool validate, bool[5] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
contrastive = torch.ops.pycse.contrastive.default

# Where arguments stand in the schema: those that may require gradients come first, in the order of Needs.
_DIFFERENTIABLE, _TENSORS, _WEIGHT, _REDUCTION = 5, 8, 4, 15
_EMPTY = (0,)
_PLAIN = (Tensor, torch.nn.Parameter)
_NO_GUARD = contextlib.nullcontext()


def _gradient_dtype(z: Tensor) -> torch.dtype:
    return torch.float32 if z.dtype == torch.float16 else z.dtype


def _rows(z: Tensor) -> Tensor:
    """z with unit stride along features, in a type that the kernels take."""
    z = z.float() if z.dtype == torch.float16 else z
    return z if z.stride(1) == 1 and z.stride(0) >= z.shape[1] else z.contiguous()


def _value(tensor: Tensor | None, value: float) -> float | Tensor:
    if tensor is None:
        return value
    return tensor.item() if tensor.device.type == "cpu" else tensor.detach()


def _forward(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | None,
    m: Tensor | None,
    weight: Tensor | None,
    positives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature_value: float,
    m_value: float,
    focal: bool,
    hard_negative_weight: float,
    exclude_above: float | None,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    backend: str,
    validate: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    run = backends.module(backend, z1.device.type, "contrastive").contrastive
    if validate or z1.device.type == "cpu":
        check_values(z1, z2, temperature, m, weight, positives, focal)
    need = Needs(*needs)
    p = Contrastive(
        _rows(z1),
        _rows(z2),
        _value(temperature, temperature_value),
        _value(m, m_value),
        focal,
        None if positives is None else positives.contiguous(),
        None if query_ids is None else query_ids.contiguous(),
        None if key_ids is None else key_ids.contiguous(),
        weight,
        hard_negative_weight,
        exclude_above,
        symmetric,
        normalize,
        reduction,
        need,
    )
    out = run(p)
    loss = out.loss if out.loss is not None and reduction != "none" else p.reduce(out.rows)

    def in_type_of(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
        return gradient if gradient is None or like is None else gradient.to(like.dtype)

    return (
        loss,
        out.dz1,
        out.dz2,
        in_type_of(out.dtemperature, temperature),
        in_type_of(out.dm, m),
        in_type_of(p.weight_gradient(out.rows), weight) if need.weight else None,
    )


def _implementation(*args: Any) -> tuple[Tensor, ...]:
    """_forward for the dispatcher: an op returns tensors, none of which are None or alias each other."""
    return tuple(args[0].new_empty(_EMPTY) if t is None else t for t in _forward(*args))


@torch.library.register_fake("pycse::contrastive", lib=_library)
def _fake(z1, z2, temperature, m, weight, *args):
    reduction, needs = args[-4], Needs(*args[-1])
    loss_dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    loss = z1.new_empty(z1.shape[:1] if reduction == "none" else (), dtype=loss_dtype)
    empty = lambda: z1.new_empty(_EMPTY)  # noqa: E731
    like = lambda t: t.new_empty(t.shape)  # noqa: E731
    return (
        loss,
        z1.new_empty(z1.shape, dtype=_gradient_dtype(z1)) if needs.z1 else empty(),
        z2.new_empty(z2.shape, dtype=_gradient_dtype(z2)) if needs.z2 else empty(),
        like(temperature) if needs.temperature and temperature is not None else empty(),
        like(m) if needs.m and m is not None else empty(),
        like(weight) if needs.weight and weight is not None else empty(),
    )


class _Contrastive(torch.autograd.Function):
    """Arguments are ``run`` (the op, or in eager mode its implementation) and the op's, needs left out."""

    @staticmethod
    def forward(ctx: Any, run: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        needs = list(ctx.needs_input_grad[1 : 1 + _DIFFERENTIABLE])
        unknown = args[_REDUCTION] == "none"  # the upstream gradient is a vector that only backward knows
        loss, *gradients = run(*args, [False] * _DIFFERENTIABLE if unknown else needs)
        ctx.save_for_backward(*args[:_TENSORS])
        ctx.options, ctx.needs, ctx.run = args[_TENSORS:], needs, run
        ctx.gradients = None if unknown else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        result: list[Tensor | None] = [None] * (1 + _TENSORS + len(ctx.options))
        if upstream is None:
            return tuple(result)
        twice = torch.is_grad_enabled()  # create_graph
        with torch.no_grad() if twice else _NO_GUARD:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                gradients, upstream = _again(ctx, upstream)
            for k, needed in enumerate(ctx.needs):
                if needed:
                    result[k + 1] = _scaled(gradients[k], upstream, tensors[k])
        return tuple(_raise_on_use(result) if twice else result)


def _again(ctx: Any, upstream: Tensor) -> tuple[list[Tensor], Tensor]:
    """The gradients once more, and what is left to multiply them by."""
    tensors, options = list(ctx.saved_tensors), list(ctx.options)
    with torch.autocast(upstream.device.type, enabled=False):
        if options[_REDUCTION - _TENSORS] != "none":
            return list(ctx.run(*tensors, *options, ctx.needs)[1:]), upstream
        # sum_i u_i w_i L_i: the upstream gradient of each row is its weight.
        weight, options[_REDUCTION - _TENSORS] = tensors[_WEIGHT], "sum"
        tensors[_WEIGHT] = upstream if weight is None else upstream * weight
        *gradients, rows = ctx.run(*tensors, *options, ctx.needs)[1:]
    return [*gradients, rows * upstream if ctx.needs[_WEIGHT] else rows], upstream.new_ones(())


def _scaled(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    if type(gradient) is not Tensor:  # being traced: no values, nothing in place
        return (gradient * upstream).to(like.dtype)
    if upstream.device.type != "cpu" or upstream.item() != 1:
        gradient.mul_(upstream)
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)


def _raise_on_use(gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The same gradients, raising where a second derivative is taken through them."""
    message = (
        b"pycse: double backward through a fused loss is not supported (its gradients are made in forward); "
        b"use backend='reference' for second derivatives"
    )
    raising = torch._C._functions.DelayedError(message, 1)
    return [None if g is None else raising(g.detach().requires_grad_()) for g in gradients]


def _below_autograd(*args: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return contrastive(*args)


def _wants_gradients(tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    if _wants_gradients(args[:_DIFFERENTIABLE]):
        loss = _Contrastive.apply(_below_autograd, *args[:-1])
        return (loss, *(loss.detach().new_empty(_EMPTY) for _ in range(_DIFFERENTIABLE)))
    return _below_autograd(*args)


def _autocast(device: str, key: torch._C.DispatchKey) -> Any:
    """Casts the embeddings only, never the temperature, m or weights."""
    keys = torch._C.DispatchKeySet(key)

    def kernel(z1: Tensor, z2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dtype = torch.get_autocast_dtype(device)

        def cast(z: Tensor) -> Tensor:
            return z if z.dtype == torch.float64 else z.to(dtype)

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return contrastive(cast(z1), cast(z2), *rest)

    return kernel


_library.impl("contrastive", _implementation, "CompositeExplicitAutograd")
_library.impl("contrastive", _autograd, "Autograd")
_library.impl("contrastive", _autocast("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("contrastive", _autocast("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")


def loss(z1: Tensor, z2: Tensor, *rest: Any) -> Tensor:
    """The op's loss for the arguments of its schema up to ``validate``.

    Plain eager tensors skip the dispatcher, which costs as much as a batch of 64 computes.
    """
    plain = (
        not torch.compiler.is_compiling()
        and type(z1) in _PLAIN
        and type(z2) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.is_autocast_enabled(z1.device.type)
    )
    if not plain:
        return contrastive(z1, z2, *rest, [False] * _DIFFERENTIABLE)[0]
    if _wants_gradients((z1, z2, *rest[: _DIFFERENTIABLE - 2])):
        return _Contrastive.apply(_forward, z1, z2, *rest)
    value: Any = _forward(z1, z2, *rest, [False] * _DIFFERENTIABLE)  # type: ignore[call-arg]
    return value[0]
