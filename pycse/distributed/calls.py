"""A public function's call over a group: the joined batch's problem, of this rank's rows.

    loss of a rank = W / sum B  sum over its rows of L_i           "mean"; with weights W / sum w  sum_i w_i L_i
                   = W  sum_i w_i L_i                              "sum"
                   = w_i L_i                                       "none"

W ranks, sums without index over all of them: the mean over ranks is the loss of the joined batch, and the gradients
that DDP averages are its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycse import backends, ops
from pycse.distributed.groups import check_device, device_of, group_of
from pycse.distributed.joined import NUMBERS, Local
from pycse.distributed.talk import TALK, Headers
from pycse.distributed.talk import exchange as headers
from pycse.problem import Angular, Contrastive, Distillation, Lengths, Rows, Sigmoid, Supervised
from pycse.validation import check_adapacse, check_lists, check_sigmoid_values, check_supervised, check_values
from pycse.validation.checks import autocast, choice

# What only tensors' values show, which a rank finds out before it talks to others.
VALUES: dict[type, Callable[[Any], None]] = {
    Contrastive: check_values,
    Sigmoid: check_sigmoid_values,
    Supervised: check_supervised,
    Angular: check_adapacse,
}
OPS: dict[type, str] = {
    Contrastive: "contrastive",
    Lengths: "contrastive",
    Sigmoid: "sigmoid",
    Supervised: "supervised",
    Angular: "adapacse",
    Distillation: "distill",
}
EXCHANGES = ("gather", "ring", "auto")


@torch.compiler.disable(reason=TALK)
def contrastive(
    name: str, make: Callable[..., tuple[Any, ...]], given: dict[str, Any], *, exchange: str = "auto", **how: Any
) -> tuple[Tensor, ...]:
    """The loss; of several lengths, which ``make`` returns beside the problem, also each length's."""
    local, group, heads = meet(name, make, given, exchange=exchange, **how)
    lengths = local.problems[1:]
    if not lengths and local.by_ring(exchange, how["backend"], heads):
        return (local.ring(group, heads, how["backend"]),)
    p, *_ = local.joined(group, heads)
    if not lengths:
        return (_loss(p, lambda: ops.contrastive(p, how["backend"], how["validate"])),)
    if p.mine.start < p.mine.stop:
        return ops.matryoshka(p, lengths[0], how["backend"], how["validate"])
    loss = nothing(p, p.acc)
    return loss, loss.detach().expand(len(lengths[0].dims), *loss.shape)


def _over_ranks(op: Callable[[Any, str, bool], Tensor]) -> Callable[..., Tensor]:
    """The call over a group of a loss whose keys are always gathered."""

    @torch.compiler.disable(reason=TALK)
    def call(name: str, make: Callable[..., Any], given: dict[str, Any], **how: Any) -> Tensor:
        p, *_ = joined(name, lambda **arguments: [make(**arguments)], given, **how)
        return _loss(p, lambda: op(p, how["backend"], how["validate"]))

    return call


sigmoid, supervised, adapacse = (_over_ranks(op) for op in (ops.sigmoid, ops.supervised, ops.adapacse))


@torch.compiler.disable(reason=TALK)
def distill(name: str, make: Callable[..., Any], given: dict[str, Any], **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The total, the contrastive part (without keys 0) and the distillation."""
    p, d = joined(name, make, given, **how)
    if d.mine.start < d.mine.stop:
        return ops.distill(p, d, how["backend"], how["validate"])  # type: ignore[return-value]
    loss = nothing(p, d.acc)
    return loss, loss.detach(), loss.detach()


def _loss(p: Rows, loss: Callable[[], Tensor]) -> Tensor:
    return loss() if p.mine.start < p.mine.stop else nothing(p, p.acc)


def nothing(p: Any, acc: torch.dtype) -> Tensor:
    """The loss of a rank without rows: 0, with gradients of 0, so that its backward takes part as well."""
    tensors = (p.z1, p.z2, *(getattr(p, name, None) for name in NUMBERS[type(p)]), p.weight)
    return _Nothing.apply(acc, p.reduction == "none", *(t for t in tensors if isinstance(t, Tensor)))


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acc: torch.dtype, rows: bool, *tensors: Tensor) -> Tensor:
        # Saved as a fused loss saves its inputs, and not looked at in the first backward either: torch.utils.checkpoint
        # computes again when something saved is needed, up to the last that was; ranks have to do so alike.
        ctx.save_for_backward(*(t for t in tensors if t.requires_grad))
        ctx.shapes = [(t.shape, t.dtype, t.device) for t in tensors]
        return torch.zeros((0,) if rows else (), dtype=acc, device=tensors[0].device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)


def joined(name: str, make: Callable[..., Any], given: dict[str, Any], **how: Any) -> list[Any]:
    """The problems of a call over a group, as the joined batch has them."""
    local, group, heads = meet(name, make, given, **how)
    return local.joined(group, heads)


def meet(
    name: str,
    make: Callable[..., Any],
    given: dict[str, Any],
    *,
    group: Any,
    backend: str,
    validate: bool,
    replicated_keys: int = 0,
    paired: bool = False,
    exchange: str = "gather",
) -> tuple[Local, dist.ProcessGroup, Headers]:
    """The problems of a call over a group on this rank, and the headers of all.

    Args:
        name: the public function's.
        make: its problems in one process, from the arguments in ``given``.
        given: tensors, or what holds them, by argument; z1 is among them.
        group, backend, validate, replicated_keys: the function's.
        paired: there are as many keys as rows.
        exchange: how keys are to come, "gather", "ring" or "auto".

    Raises:
        What ``make`` raises on this rank; RuntimeError on a rank where another has raised; ValueError on all of them
        where they differ.
    """
    group = group_of(group)
    device = device_of(group, given["z1"])
    refused: Exception | None = None
    local: Local | None = None
    told = {"function": name}
    try:
        choice("exchange", exchange, EXCHANGES)
        given = cast(given)
        problems = list(make(**filled(given, paired)))
        check_device(group, given["z1"].device)
        found = backends.module(backend, device.type, OPS[type(problems[-1])]).__name__.split(".")[2]
        if exchange == "ring" and isinstance(problems[-1], Lengths):
            raise ValueError("exchange='ring' and dims exclude each other (keys travel whole); use 'gather' or 'auto'")
        if exchange == "ring" and found not in backends.IN_PARTS:
            raise ValueError(
                f"exchange='ring' needs a backend that takes keys in blocks ({', '.join(backends.IN_PARTS)}), got "
                f"{found!r}"
            )
        if validate or device.type == "cpu":
            VALUES[type(problems[0])](problems[0])
        if isinstance(problems[0], Contrastive):
            check_lists(problems[0])
        local = Local.of(problems, given, replicated_keys)
        told = local.description() | {
            "function": name, "backend": f"{backend!r}, which is {found}", "validate": repr(validate),
            "exchange": repr(exchange), "replicated_keys": repr(replicated_keys),
        }  # fmt: skip
    except Exception as error:
        refused = error
    heads = headers(group, device, told, refused, **({} if local is None else local.counts()))
    assert local is not None
    return local, group, heads


def cast(given: dict[str, Any]) -> dict[str, Any]:
    """Embeddings as autocast has them, before the exchange: fewer bytes."""
    z1, z2 = given["z1"], given.get("z2")
    if not (isinstance(z1, Tensor) and autocast(z1.device.type)):
        return given
    dtype = torch.get_autocast_dtype(z1.device.type)
    kept = (torch.float64, dtype)
    return given | {
        name: z.to(dtype) for name, z in (("z1", z1), ("z2", z2)) if isinstance(z, Tensor) and z.dtype not in kept
    }


def filled(given: Mapping[str, Any], paired: bool) -> dict[str, Any]:
    """The arguments, with rows of zeros where a rank has none: one process has at least one."""
    z1, z2 = given["z1"], given.get("z2")
    if not (isinstance(z1, Tensor) and z1.dim() == 2 and z1.shape[0] == 0 and z1.shape[1] > 0):
        return dict(given)
    keys = z2.shape[0] if isinstance(z2, Tensor) and z2.dim() > 0 and z2.shape[0] else 2 - paired  # one hard negative

    def one(x: Any, n: int) -> Any:
        if isinstance(x, Tensor):
            return x.detach().new_zeros(n, *x.shape[1:]) if x.dim() > 0 and x.shape[0] == 0 else x
        return x

    result = dict(given)
    for key, x in given.items():
        if key == "negatives" and x is not None:
            ptr, index = x
            result[key] = (ptr.new_zeros(2) if isinstance(ptr, Tensor) and ptr.shape == (1,) else ptr, index)
        elif key == "guides" and x is not None:
            result[key] = [(one(q, 1), one(k, keys)) for q, k in x]
        elif key == "teachers" and x is not None:
            result[key] = [one(e, 1) for e in x]
        elif key == "weight" and isinstance(x, Tensor) and x.shape == (0,):
            result[key] = x.detach().new_ones(1)
        else:
            result[key] = one(x, keys if key in ("z2", "key_ids", "ids2") else 1)
    return result
