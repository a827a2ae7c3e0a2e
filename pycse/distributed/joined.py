"""What a rank has of a call, and the problem of the joined batch that comes of it.

Rows and keys are numbered as in one process with all rows, of which a rank computes its own (problem.Share).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycse import backends
from pycse.distributed import ring
from pycse.distributed.payload import Exchange, Layout, Piece, gathered
from pycse.distributed.talk import Headers
from pycse.problem import Angular, Contrastive, Distillation, Share, Sigmoid, Supervised
from pycse.validation.checks import whole
from pycse.validation.distillation_losses import span_of_ranks

# What may be a tensor that is trained; every rank has it.
NUMBERS: dict[type, tuple[str, ...]] = {
    Contrastive: ("temperature", "m"),
    Sigmoid: ("scale", "bias"),
    Supervised: ("temperature",),
    Angular: ("temperature",),
    Distillation: (),
}
ROWS = ("query_ids", "ids1")  # what other ranks need of rows that are keys, beside z1
KEYS = ("key_ids", "guide_keys", "ids2")  # and of keys, beside z2
WHOLE = ("guide_logits", "logits")  # of all rows and keys, which no rank has


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
        z1 = given["z1"]
        local = cls(problems, z1, given.get("z2"), given.get("weight"))
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

    def description(self) -> dict[str, str]:
        """What must be equal on all ranks, by argument."""
        told = {
            "features of z1": str(self.z1.shape[1]), "dtype of z1": str(self.z1.dtype),
            "gradients of": ", ".join(self.wanted) or "nothing", "gradients": str(torch.is_grad_enabled()),
        }  # fmt: skip
        for p in self.problems:
            for field, value in vars(p).items():
                if field in ("z1", "z2", "share", "needs", "need", "seed", "weight", "positives"):  # each rank's own
                    continue
                if field == "temperature" and isinstance(value, Tensor) and value.dim() == 1:
                    shown = "numbers in a tensor" if value.requires_grad or value.is_cuda else repr(value.tolist())
                elif isinstance(value, Tensor):
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
            if all_rows and (t := vars(p).get(name)) is not None:
                names.append((name, "rows"))
                pieces.append(Piece(t[: self.B], "rows"))
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
        for name, (t, value, how) in self._numbers(p, heads).items():
            own[name] = t
            result.append(value)
            of.append(how)
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
        first = replace(p, **changes, **{n: values[n] for n in (*ROWS, *KEYS) if n in values})
        self._place(first, p, layout, values)
        if not distills:
            return [first]
        later = {name: changes[name] for name in ("share", "weight", "reduction", "z1")}
        if d.shuffle == "sample":
            later["seed"] = heads.seed.clone()
        return [first, replace(d, **later, teachers=[values[f"teacher {k}"] for k in range(len(d.teachers))])]

    def _numbers(self, p: Any, heads: Headers) -> dict[str, tuple[Tensor, Tensor, str]]:
        """What an Exchange takes beside embeddings: by name this rank's, all ranks', and how gradients are joined.
        Numbers that may be trained, and the sum of all weights, where the mean's gradient goes through it."""
        given = {name: getattr(p, name) for name in NUMBERS[type(p)]}
        result = {n: (t, t.detach().clone(), "mean") for n, t in given.items() if isinstance(t, Tensor)}
        if p.reduction == "mean" and self.weight is not None:
            own = self.weight.sum(dtype=torch.float64)
            result["total"] = (own, own.detach().new_tensor(heads.total), "summed")
        return result

    def _weights(self, p: Any, heads: Headers, new: dict[str, Any]) -> Tensor:
        """What the rows' losses are multiplied by."""
        factor: Any = heads.size if p.reduction != "none" else 1
        if p.reduction == "mean":
            total = new.pop("total", heads.total)
            factor = factor / total if isinstance(total, Tensor) or total else math.nan
        if self.weight is not None:
            return self.weight.to(p.acc) * factor
        return torch.ones(self.B, dtype=p.acc, device=self.z1.device) * factor

    def by_ring(self, exchange: str, backend: str, heads: Headers) -> bool:
        """Whether keys travel: as asked, or where all of them and their gradients take too much memory."""
        if heads.size == 1:
            return False
        if exchange != "auto":
            return exchange == "ring"
        found = backends.module(backend, self.z1.device.type, "contrastive").__name__.split(".")[2]
        if found not in backends.IN_PARTS:
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
        self._check_groups(p, layout)
        numbers: dict[str, Any] = {}
        if given := self._numbers(p, heads):
            own, values, how = zip(*given.values())
            numbers = dict(zip(given, Exchange.apply(group, layout, list(values), list(how), *own)))
        weight = self._weights(p, heads, numbers)
        p = replace(p, **{n: z for n, z in (("z1", self.z1), ("z2", self.z2)) if z.shape[0]})
        if self.private:
            p = replace(
                p, **{n: self._ordered(t) for n in ("key_ids", "guide_keys") if (t := getattr(p, n)) is not None}
            )
            every = torch.arange(p.z1.shape[0], dtype=torch.int64, device=self.z1.device)
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
