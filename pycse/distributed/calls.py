"""A public function's call over a group: the joined batch's problem, of this rank's rows.

    loss of a rank = W / sum B  sum over its rows of L_i           "mean"; with weights W / sum w  sum_i w_i L_i
                   = W  sum_i w_i L_i                              "sum"
                   = w_i L_i                                       "none"

W ranks, sums without index over all of them: the mean over ranks is the loss of the joined batch, and the gradients
that DDP averages are its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycse import backends, ops
from pycse.distributed import ring
from pycse.distributed.groups import group_of
from pycse.distributed.payload import Exchange, Layout, Piece, gathered
from pycse.distributed.talk import Headers
from pycse.distributed.talk import exchange as headers
from pycse.problem import Angular, Contrastive, Distillation, Rows, Share, Sigmoid, Supervised
from pycse.validation import check_adapacse, check_lists, check_sigmoid_values, check_supervised, check_values
from pycse.validation.checks import autocast, choice, whole
from pycse.validation.distillation_losses import span_of_ranks

# What may be a tensor that is trained; every rank has it.
NUMBERS: dict[type, tuple[str, ...]] = {
    Contrastive: ("temperature", "m"),
    Sigmoid: ("scale", "bias"),
    Supervised: ("temperature",),
    Angular: ("temperature",),
    Distillation: (),
}
# What only tensors' values show, which a rank finds out before it talks to others.
VALUES: dict[type, Callable[[Any], None]] = {
    Contrastive: check_values,
    Sigmoid: check_sigmoid_values,
    Supervised: check_supervised,
    Angular: check_adapacse,
}
OPS: dict[type, str] = {
    Contrastive: "contrastive",
    Sigmoid: "sigmoid",
    Supervised: "supervised",
    Angular: "adapacse",
    Distillation: "distill",
}
ROWS = ("query_ids", "exclude_each", "guide_queries", "ids1", "positives")  # beside z1 and weight
KEYS = ("key_ids", "guide_keys", "ids2")  # beside z2
WHOLE = ("guide_logits", "logits")  # of all rows and keys, which no rank has

EXCHANGES = ("gather", "ring", "auto")
TALK = "pycse: ranks talk to each other"


@torch.compiler.disable(reason=TALK)
def contrastive(
    name: str, make: Callable[..., Contrastive], given: dict[str, Any], *, exchange: str = "auto", **how: Any
) -> Tensor:
    local, group, heads = meet(name, lambda **arguments: [make(**arguments)], given, exchange=exchange, **how)
    if local.by_ring(exchange, how["backend"], heads):
        return local.ring(group, heads, how["backend"])
    p, *_ = local.joined(group, heads)
    return _loss(p, lambda: ops.contrastive(p, how["backend"], how["validate"]))


@torch.compiler.disable(reason=TALK)
def sigmoid(name: str, make: Callable[..., Sigmoid], given: dict[str, Any], **how: Any) -> Tensor:
    p, *_ = joined(name, lambda **arguments: [make(**arguments)], given, **how)
    return _loss(p, lambda: ops.sigmoid(p, how["backend"], how["validate"]))


@torch.compiler.disable(reason=TALK)
def supervised(name: str, make: Callable[..., Supervised], given: dict[str, Any], **how: Any) -> Tensor:
    p, *_ = joined(name, lambda **arguments: [make(**arguments)], given, **how)
    return _loss(p, lambda: ops.supervised(p, how["backend"], how["validate"]))


@torch.compiler.disable(reason=TALK)
def adapacse(name: str, make: Callable[..., Angular], given: dict[str, Any], **how: Any) -> Tensor:
    p, *_ = joined(name, lambda **arguments: [make(**arguments)], given, **how)
    return _loss(p, lambda: ops.adapacse(p, how["backend"], how["validate"]))


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
    empty = [t.flatten()[:0].to(acc) for t in tensors if isinstance(t, Tensor)]
    none = torch.cat(empty)
    return none if p.reduction == "none" else none.sum()


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
    z1 = given["z1"]
    device = z1.device if isinstance(z1, Tensor) else torch.device("cpu")
    group = group_of(group, device.type)
    if not isinstance(z1, Tensor):
        device = torch.device(dist.distributed_c10d._get_object_coll_device(group))
    problems: list[Any] = []
    refused: Exception | None = None
    local: Local | None = None
    try:
        choice("exchange", exchange, EXCHANGES)
        problems = list(make(**filled(given, paired)))
        check_backend(problems, device.type, backend, exchange)
        if validate or device.type == "cpu":
            VALUES[type(problems[0])](problems[0])
        if isinstance(problems[0], Contrastive):
            check_lists(problems[0])
        local = Local.of(problems, given, replicated_keys)
    except (TypeError, ValueError, RuntimeError) as error:
        refused = error
    told = {"function": name}
    if local is not None:
        told = local.description(name, backend, validate) | {"exchange": repr(exchange)}
    counts = {} if local is None else local.counts()
    heads = headers(group, device, told, refused, **counts)
    assert local is not None
    return local, group, heads


def _found(backend: str, device: str, op: str) -> str:
    """The backend that a call comes to."""
    return backends.module(backend, device, op).__name__.split(".")[2]


def check_backend(problems: list[Any], device: str, backend: str, exchange: str) -> None:
    """That it runs here, and by blocks of keys where they travel."""
    found = _found(backend, device, OPS[type(problems[-1])])
    if exchange == "ring" and found not in backends.IN_PARTS:
        raise ValueError(
            f"exchange='ring' needs a backend that takes keys in blocks ({', '.join(backends.IN_PARTS)}), got {found!r}"
        )


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
            ptr = x[0]
            result[key] = (ptr.new_zeros(2), x[1])
        elif key == "guides" and x is not None:
            result[key] = [(one(q, 1), one(k, keys)) for q, k in x]
        elif key == "teachers" and x is not None:
            result[key] = [one(e, 1) for e in x]
        elif key == "weight" and isinstance(x, Tensor):
            result[key] = x.detach().new_ones(1)
        else:
            result[key] = one(x, keys if key in ("z2", "key_ids", "ids2") else 1)
    return result


class Local:
    """A call's problems as one process has them, and the tensors of this rank's that go with them."""

    def __init__(self, problems: list[Any], z1: Tensor, z2: Tensor | None, weight: Tensor | None) -> None:
        self.problems, self.z1, self.z2, self.weight = problems, z1, z2, weight
        self.B, self.private = z1.shape[0], 0
        self.N = 0 if z2 is None else z2.shape[0]

    @classmethod
    def of(cls, problems: list[Any], given: Mapping[str, Any], replicated_keys: int) -> Local:
        whole("replicated_keys", replicated_keys)
        p = problems[0]
        for one in problems:
            for name in WHOLE:
                if getattr(one, name, None) is not None:
                    shown = "teacher_logits" if name == "logits" else name
                    raise ValueError(
                        f"{shown} and group exclude each other (no process has all rows and keys); give the embeddings"
                    )
        z1, z2 = given["z1"], given.get("z2")
        if autocast(z1.device.type):  # before the exchange: fewer bytes
            dtype = torch.get_autocast_dtype(z1.device.type)
            z1, z2 = (z if z is None or z.dtype == torch.float64 else z.to(dtype) for z in (z1, z2))
        local = cls(problems, z1, z2, given.get("weight"))
        index = getattr(p, "negatives_index", None)
        if index is not None:
            listed = torch.zeros(local.N, dtype=torch.bool, device=index.device)
            listed[index] = True
            own = listed.to(z1.device)
        else:
            own = torch.zeros(local.N, dtype=torch.bool, device=z1.device)
        if not 0 <= replicated_keys <= local.N:
            raise ValueError(f"replicated_keys must lie in [0, {local.N}] (the keys), got {replicated_keys}")
        if replicated_keys and getattr(p, "logit", None) is not None and p.logit.has_own and index is None:
            raise ValueError("replicated_keys and hard negatives, which are the last keys too, exclude each other")
        if replicated_keys:
            own[local.N - replicated_keys :] = True
        if index is not None or replicated_keys:
            local._keep(own)
        return local

    def _keep(self, own: Tensor) -> None:
        """Keys that no other rank sees, or that all have, stay: they follow the joined batch's."""
        assert self.z2 is not None
        order = own.long().argsort(stable=True)
        self.order, self.private = order, int(own.sum())
        self.z2 = self.z2[order]

    def shared(self, t: Tensor) -> Tensor:
        """Of what is by keys, that of the keys that go to all ranks."""
        return t[: self.N - self.private]

    @property
    def wanted(self) -> tuple[str, ...]:
        """Whose gradients are wanted."""
        p = self.problems[0]
        given = {"z1": self.z1, "z2": self.z2, "weight": self.weight}
        given |= {name: getattr(p, name) for name in NUMBERS[type(p)]}
        return tuple(
            n for n, t in given.items() if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()
        )

    def description(self, name: str, backend: str, validate: bool) -> dict[str, str]:
        told = {
            "function": name, "backend": repr(backend), "validate": repr(validate),
            "features of z1": str(self.z1.shape[1]), "dtype of z1": str(self.z1.dtype),
            "gradients of": ", ".join(self.wanted) or "nothing", "gradients": str(torch.is_grad_enabled()),
        }  # fmt: skip
        for p in self.problems:
            for field, value in vars(p).items():
                if field in ("z1", "z2", "share", "needs", "need", "seed", "weight", "positives"):  # each rank's own
                    continue
                if isinstance(value, Tensor):
                    shown = "a number in a tensor" if value.dim() == 0 else f"{value.dtype}, {tuple(value.shape[1:])}"
                elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                    shown = ", ".join(f"{e.shape[1]} features of {e.dtype}" for e in value)
                else:
                    shown = repr(value)
                told[_shown(field)] = shown
        told["z2"] = "not given" if self.z2 is None else "given"
        told["weight"] = "not given" if self.weight is None else "given"
        return told

    def counts(self) -> dict[str, Any]:
        d = self.problems[-1]
        seed = d.seed if isinstance(d, Distillation) and d.shuffle == "sample" else 0
        return {"rows": self.B, "keys": self.N - self.private, "seed": seed, "weight": self.weight}

    def joined(self, group: dist.ProcessGroup, heads: Headers) -> list[Any]:
        """The problems of the joined batch, of this rank's rows."""
        p, d = self.problems[0], self.problems[-1]
        layout = Layout(heads.rank, heads.rows, heads.keys)
        share = Share(layout.row_begin[heads.rank], layout.row_begin[heads.rank + 1], layout.B)
        if layout.B == 0:
            raise ValueError("z1 must have at least one row on some rank, got none")
        self._check_groups(p, layout)
        distills = isinstance(d, Distillation)
        if distills and d.cut is not None and d.cut.kind == "span":
            span_of_ranks((int(d.cut.value), d.cut.end), layout.B)
        all_rows = distills or self._rows_are_keys(p)

        names = [("z1", "rows")] * all_rows + [("z2", "keys")] * (self.z2 is not None)
        held: dict[str, Any] = {"z1": self.z1, "z2": None if self.z2 is None else self.shared(self.z2)}
        pieces = [Piece(held[name], of) for name, of in names]
        for name in ROWS:
            if all_rows and name in ("query_ids", "ids1") and getattr(p, name, None) is not None:
                names.append((name, "rows"))
                pieces.append(Piece(getattr(p, name)[: self.B], "rows"))
        for name in KEYS:
            if (t := vars(p).get(name)) is not None:
                names.append((name, "keys"))
                pieces.append(Piece(self.shared(self._ordered(t)), "keys"))
        if distills:
            for k, e in enumerate(d.teachers):
                names.append((f"teacher {k}", "rows"))
                pieces.append(Piece(e[: self.B], "rows"))
        values = dict(zip((name for name, _ in names), gathered(group, layout, pieces)))

        # Embeddings and numbers once more, with their way back.
        own: dict[str, Any] = {name: held[name] for name in ("z1", "z2") if name in values}
        of = ["rows" if name == "z1" else "keys" for name in own]
        result = [values[name] for name in own]
        for name in NUMBERS[type(p)]:
            if isinstance(t := getattr(p, name), Tensor):
                own[name] = t
                of.append("mean")
                result.append(t.detach().clone())
        self._add_total(p, heads, own, of, result)
        new = dict(zip(own, Exchange.apply(group, layout, result, of, *own.values()))) if own else {}

        if self.private:
            assert self.z2 is not None
            new["z2"] = torch.cat((new["z2"], self.z2[self.N - self.private :]))
            for name in KEYS:
                if name in values:
                    values[name] = torch.cat((values[name], self._ordered(getattr(p, name))[self.N - self.private :]))
        weight = self._weights(p, heads, new)
        changes: dict[str, Any] = {
            "share": share, "weight": weight, "reduction": "none" if p.reduction == "none" else "sum",
            "z1": new.pop("z1", self.z1), **new,
        }  # fmt: skip
        first = replace(p, **changes, **{n: values[n] for n in ("query_ids", "ids1", *KEYS) if n in values})
        self._place(first, p, layout, values)
        if not distills:
            return [first]
        later = {name: changes[name] for name in ("share", "weight", "reduction", "z1")}
        if d.shuffle == "sample":
            later["seed"] = heads.seed.clone()
        return [first, replace(d, **later, teachers=[values[f"teacher {k}"] for k in range(len(d.teachers))])]

    def _add_total(self, p: Any, heads: Headers, own: dict[str, Any], of: list[str], result: list[Tensor]) -> None:
        """The sum of all weights, where the mean's gradient goes through it."""
        if p.reduction == "mean" and self.weight is not None:
            own["total"] = self.weight.sum(dtype=torch.float64)
            of.append("summed")
            result.append(own["total"].detach().new_tensor(heads.total))

    def _weights(self, p: Any, heads: Headers, new: dict[str, Any]) -> Tensor:
        """What the rows' losses are multiplied by."""
        factor: Any = heads.size if p.reduction != "none" else 1
        if p.reduction == "mean":
            total = new.pop("total", heads.total)
            factor = factor / total if isinstance(total, Tensor) or total else math.nan
        if self.weight is not None:
            return (self.weight * factor).to(p.acc)
        return torch.ones(self.B, dtype=p.acc, device=self.z1.device) * factor

    def by_ring(self, exchange: str, backend: str, heads: Headers) -> bool:
        """Whether keys travel: as asked, or where all of them and their gradients take too much memory."""
        if heads.size == 1:
            return False
        if exchange != "auto":
            return exchange == "ring"
        if _found(backend, self.z1.device.type, "contrastive") not in backends.IN_PARTS:
            return False
        assert self.z2 is not None
        layout = Layout(heads.rank, heads.rows, heads.keys)
        bytes_ = ring.gathered_bytes(layout, self.z1.shape[1], self.z1.dtype, "z2" in self.wanted)
        return bytes_ > ring.GATHERED_BYTES

    def ring(self, group: dist.ProcessGroup, heads: Headers, backend: str) -> Tensor:
        """The loss of a problem whose keys travel."""
        p = self.problems[0]
        assert self.z2 is not None
        layout = Layout(heads.rank, heads.rows, heads.keys)
        if layout.B == 0:
            raise ValueError("z1 must have at least one row on some rank, got none")
        own: dict[str, Any] = {}
        of: list[str] = []
        result: list[Tensor] = []
        for name in NUMBERS[type(p)]:
            if isinstance(t := getattr(p, name), Tensor):
                own[name] = t
                of.append("mean")
                result.append(t.detach().clone())
        self._add_total(p, heads, own, of, result)
        numbers = dict(zip(own, Exchange.apply(group, layout, result, of, *own.values()))) if own else {}
        weight = self._weights(p, heads, numbers)
        if self.B:
            p = replace(p, z1=self.z1, z2=self.z2)
        if self.private:
            p = replace(
                p, **{n: self._ordered(t) for n in ("key_ids", "guide_keys") if (t := getattr(p, n)) is not None}
            )
            every = torch.arange(self.B, dtype=torch.int64, device=self.z1.device)
            p.positives = self._place_of[every if p.positives is None else p.positives]
            if p.negatives_index is not None:
                p.negatives_index = self._place_of.to(p.negatives_index.device)[p.negatives_index]
        rows = ring.rows(
            group, layout, p, {"z1": self.z1, "z2": self.z2}, numbers, backend, self.N - self.private
        )  # fmt: skip
        losses = rows * weight
        return losses if p.reduction == "none" else losses.sum()

    @property
    def _place_of(self) -> Tensor:
        """Where each of this rank's keys is in z2, where private ones come last."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(self.N, dtype=torch.int64, device=place.device)
        return place

    def _ordered(self, t: Tensor) -> Tensor:
        """What is by keys, in the order of z2."""
        t = t[: self.N]
        return t[self.order.to(t.device)] if self.private else t

    def _rows_are_keys(self, p: Any) -> bool:
        """Whether rows are other rows' keys as well."""
        if isinstance(p, Supervised):
            return p.same
        return isinstance(p, Contrastive) and (p.symmetric or "q" in (d[1] for d in p.directions.split()))

    def _check_groups(self, p: Any, layout: Layout) -> None:
        if not isinstance(p, Contrastive) or self.z2 is None or p.negatives_index is not None:
            return
        documents = any("d" in name and name != "qd" for name in p.directions.split())
        if (p.logit.has_own or documents or p.symmetric) and not layout.groups:
            raise ValueError(
                "z2 must have N = (K + 1) B keys with the same K on every rank, where directions, hardness_mode or "
                f"hard_negative_weight speak of the rows' own keys; got N = {layout.keys} for B = {layout.rows}"
            )

    def _place(self, first: Any, p: Any, layout: Layout, values: Mapping[str, Tensor]) -> None:
        """What is by rows, or numbers keys, as the joined batch has it."""
        for name in ("query_ids", "exclude_each", "ids1"):
            if name not in values and getattr(p, name, None) is not None:
                setattr(first, name, first.placed(getattr(p, name)[: self.B]))
        if getattr(p, "guide_queries", None) is not None:
            first.guide_queries = p.guide_queries[: self.B]
        if isinstance(p, Supervised) or self.z2 is None:
            return
        positives = None if p.positives is None else p.positives[: self.B]
        if positives is not None or not layout.groups or self.private:
            if positives is None:
                positives = torch.arange(self.B, dtype=torch.int64, device=self.z1.device)
            first.positives = first.placed(self._number(positives, layout))
        if getattr(p, "negatives_index", None) is not None:
            ptr, own = p.negatives_ptr, first.mine
            first.negatives_index = self._number(p.negatives_index.to(self.z1.device), layout).to(ptr.device)
            first.negatives_ptr = ptr.new_full((first.B + 1,), int(ptr[-1]))
            first.negatives_ptr[: own.start] = 0
            first.negatives_ptr[own.start : own.stop + 1] = ptr[: self.B + 1]

    def _number(self, j: Tensor, layout: Layout) -> Tensor:
        """This rank's keys j in the joined batch."""
        if not self.private:
            return layout.place(j)
        at, shared = self._place_of[j], self.N - self.private
        return torch.where(at < shared, layout.place(at), layout.N + at - shared)


def _shown(field: str) -> str:
    """A problem's field as users know it."""
    return {"exclude_each": "exclude_above", "negatives_ptr": "negatives", "form": "form of the logits"}.get(
        field, field
    )
