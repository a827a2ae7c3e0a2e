"""pycse::contrastive: the loss, and in the same pass the gradients that will be needed.

The op returns (loss, dz1, dz2, dtemperature, dm, dweight); what ``needs`` leaves out is an empty tensor. Gradients of
float16 inputs stay float32 until they are multiplied by the upstream gradient, so that loss scaling works.

Autograd keeps the gradients made in forward and gives them away in the first backward: no copy, and no memory beyond the
gradients themselves. A second backward (retain_graph) and reduction="none", whose upstream gradient forward does not know,
compute them again through the same op.
"""

from __future__ import annotations

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

# Arguments that may require gradients, in the order of Needs, and where they stand in the schema.
_DIFFERENTIABLE = 5
_EMPTY = (0,)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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

    def given(gradient: Tensor | None, like: Tensor | None) -> Tensor:
        if gradient is None or like is None:
            return z1.new_empty(_EMPTY)
        return gradient if like is z1 or like is z2 else gradient.to(like.dtype)

    return (
        loss,
        given(out.dz1, z1),
        given(out.dz2, z2),
        given(out.dtemperature, temperature),
        given(out.dm, m),
        given(p.weight_gradient(out.rows), weight) if need.weight else z1.new_empty(_EMPTY),
    )


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
    """Arguments are the op's, the last one (needs) left out."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        reduction = args[15]
        needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
        now = [False] * _DIFFERENTIABLE if reduction == "none" else needs
        with torch._C._AutoDispatchBelowAutograd():
            loss, *gradients = contrastive(*args, now)
        ctx.save_for_backward(*args[:8])
        ctx.options, ctx.needs = args[8:], needs
        ctx.gradients = None if reduction == "none" else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        nothing = (None,) * (len(ctx.options) + 3)
        if upstream is None:
            return (None,) * _DIFFERENTIABLE + nothing
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                gradients, upstream = _again(ctx, upstream)
            result = [
                _scaled(gradient, upstream, tensor) if needed else None
                for gradient, tensor, needed in zip(gradients, ctx.saved_tensors, ctx.needs)
            ]
        if torch.is_grad_enabled():  # create_graph: fail where the second derivative is asked for
            result = _twice(result)
        return (*result, *nothing)


def _again(ctx: Any, upstream: Tensor) -> tuple[list[Tensor], Tensor]:
    """The gradients once more, and what is left to multiply them by."""
    tensors, options = list(ctx.saved_tensors), list(ctx.options)
    one = upstream.new_ones(())
    with torch._C._AutoDispatchBelowAutograd():
        if options[7] != "none":
            return list(contrastive(*tensors, *options, ctx.needs)[1:]), upstream
        # sum_i u_i w_i L_i: the upstream gradient of each row is its weight.
        weight, options[7] = tensors[4], "sum"
        tensors[4] = upstream if weight is None else upstream * weight
        *gradients, rows = contrastive(*tensors, *options, ctx.needs)[1:]
    return [*gradients, rows * upstream if ctx.needs[4] else rows], one


def _scaled(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    if type(gradient) is not Tensor:  # being traced: no values, nothing in place
        return (gradient * upstream).to(like.dtype)
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return gradient.to(like.dtype)
    return gradient.mul_(upstream).to(like.dtype)


def _twice(gradients: list[Tensor | None]) -> list[Tensor | None]:
    message = (
        b"pycse: double backward through a fused loss is not supported (its gradients are made in forward); "
        b"use backend='reference' for second derivatives"
    )
    kept = [g for g in gradients if g is not None]
    raising = torch._C._functions.DelayedError(message, len(kept))
    marked = iter(raising(*[g.detach().requires_grad_() for g in kept]) if len(kept) > 1 else [raising(kept[0].detach().requires_grad_())])
    return [None if g is None else next(marked) for g in gradients]


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:_DIFFERENTIABLE]):
        loss = _Contrastive.apply(*args[:-1])
        return (loss, *(loss.detach().new_empty(_EMPTY) for _ in range(_DIFFERENTIABLE)))
    with torch._C._AutoDispatchBelowAutograd():
        return contrastive(*args)


def _autocast(device: str, key: torch._C.DispatchKey) -> Any:
    keys = torch._C.DispatchKeySet(key)

    def kernel(z1: Tensor, z2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dtype = torch.get_autocast_dtype(device)

        def cast(z: Tensor) -> Tensor:
            return z if z.dtype == torch.float64 else z.to(dtype)

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return contrastive(cast(z1), cast(z2), *rest)

    return kernel


_library.impl("contrastive", _forward, "CompositeExplicitAutograd")
_library.impl("contrastive", _autograd, "Autograd")
_library.impl("contrastive", _autocast("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("contrastive", _autocast("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
