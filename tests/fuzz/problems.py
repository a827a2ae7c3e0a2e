"""What is computed: sizes, values and options of a problem, and its truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pycse import (
    alignment,
    fused_adapacse,
    fused_distill,
    fused_distillcse,
    fused_focal_infonce,
    fused_infonce,
    grouping,
    uniformity,
)
from pycse.backends.reference.contrastive import normalized
from pycse.distillation import _grouping
from pycse.losses import AdapACSELoss, DistillCSELoss, DistillLoss, FocalInfoNCELoss, InfoNCELoss
from pycse.pattern import pack_mask
from pycse.sparse import SparseLinear, masked_linear

from oracle import Case

OPS = (
    "infonce", "focal", "uniformity", "alignment", "distill", "distillcse", "masked_linear", "SparseLinear", "adapacse",
)  # fmt: skip
FUNCTIONS = {
    "infonce": fused_infonce, "focal": fused_focal_infonce, "uniformity": uniformity, "alignment": alignment,
    "distill": fused_distill, "distillcse": fused_distillcse, "masked_linear": masked_linear,
    "adapacse": fused_adapacse,
}  # fmt: skip
MODULES = {
    "infonce": InfoNCELoss, "focal": FocalInfoNCELoss, "distill": DistillLoss, "distillcse": DistillCSELoss,
    "adapacse": AdapACSELoss,
}  # fmt: skip
BATCH = ("positives", "query_ids", "key_ids", "weight", "teachers", "teacher_logits", "seed")  # not a module's
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
KINDS = (
    "random", "confident", "duplicates", "equal", "zeros", "scales", "opposite", "unit", "small", "large", "nothing",
    "constant rows", "sliding", "shared", "not finite",
)  # fmt: skip
# Beside vectors of 8 and 16, tiles of 32 and 64; most are small, because small calls are many calls.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 33)
LARGER = (63, 64, 65, 97, 130)
LAYER_SIZES = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 48, 64, 65, 96)


def describe(c: Any, op: str | None = None) -> dict[str, Any]:
    """A problem's description from choices."""
    op = op or c.pick(OPS)
    d = dict(
        op=op, dtype=c.pick(tuple(DTYPES)), seed=c.whole(0, 9999), kind=c.pick(KINDS) if c.chance(0.6) else "random"
    )
    if op in ("masked_linear", "SparseLinear"):
        return d | _layer(c, op)
    d |= dict(B=_size(c), D=_size(c), normalize=not c.chance(0.15))
    if op == "uniformity":
        return d | dict(B=max(2, d["B"]), t=c.pick((2.0, 0.1, 1, 5.0, 20.0, 20.5, 60.0)))
    if op == "alignment":
        return d
    d |= dict(
        reduction=c.pick(("mean", "mean", "sum", "none")), weight=c.pick((None, None, *DTYPES)), ramp=c.chance(0.7)
    )
    if op in ("distill", "distillcse"):
        d |= _distillation(c)
    if op == "adapacse":
        d |= _angular(c, d["B"])
    elif op != "distill":
        d |= _contrastive(c, d["B"], focal=op == "focal" or (op == "distillcse" and c.chance(0.5)))
    return d


def _size(c: Any) -> int:
    return c.pick(LARGER) if c.chance(0.06) else c.pick(SIZES)


def _number(c: Any, values: tuple[float, ...]) -> tuple[float, str]:
    return c.pick(values), c.pick(("number", "number", "float32", "float64", "bfloat16"))


def _contrastive(c: Any, B: int, focal: bool) -> dict[str, Any]:
    d: dict[str, Any] = dict(focal=focal, temperature=_number(c, (0.05, 0.05, 0.01, 0.5, 1, 4.0)))
    if focal:
        d["m"] = _number(c, (0.3, 0.0, -1.5, 3, 2.0))
    d["symmetric"] = c.chance(0.25)
    d["N"] = B if d["symmetric"] or c.chance(0.4) else c.pick((B + 1, B + 3, 2 * B, 3 * B, _size(c)))
    d["positives"] = None
    if not d["symmetric"] and (d["N"] < B or c.chance(0.25)):
        d["positives"] = c.pick(("int64", "int32", "uint8"))
    d["hard"] = c.pick((1.5, -2.0, 30.0)) if d["N"] > B and d["N"] % B == 0 and c.chance(0.5) else 0.0
    d["ids"] = (c.pick(("int64", "int32", "int16")), c.whole(1, 6)) if c.chance(0.25) else None
    d["exclude"] = c.pick((0.013, -0.497, 0.31, 5.0, -3.0)) if c.chance(0.2) else None
    return d


def _angular(c: Any, B: int) -> dict[str, Any]:
    d = _contrastive(c, B, focal=False) | dict(symmetric=False, hard=0.0, exclude=None, normalize=True)
    d["m"] = (c.pick((0.1, 0.0, 0.02, 0.7, 1.2, math.pi / 2)), "number")
    d["guides"] = [c.pick(SIZES) for _ in range(c.whole(0, 2))]  # their widths
    return d | dict(logits=c.pick(tuple(DTYPES)))


def _distillation(c: Any) -> dict[str, Any]:
    d: dict[str, Any] = dict(
        teachers=[(c.pick(SIZES), c.pick(tuple(DTYPES)), c.pick(KINDS[:6])) for _ in range(c.whole(0, 3))],
        own=c.chance(0.1),  # the student's own embeddings, detached, are a teacher too
        logits=c.pick(tuple(DTYPES)),
        student=c.pick((0.025, 0.5, 1)),
        teacher=c.pick((0.0125, 0.1, 1)),
        shuffle=c.pick(("none", "sample", "expected")),
        divergence=c.pick(("ce", "kl", "js")),
        draw=(c.pick(("number", "tensor", "generator")), c.pick((0, 5, -1, 2**63, 2**64 - 1, -(2**63)))),
        grouping=c.pick(
            ((None, 0), ("group_p", 1.0), ("group_p", 0.3), ("group_p", 1e-7), ("group_size", 3), ("span", 2))
        ),
        group_temperature=c.pick((1.0, 0.05)),
        factor=c.pick((1.0, 0.5, 0, -2.0)),
    )
    d["weights"] = [c.pick((1, 0.5, 3, 0)) for _ in d["teachers"]] + [1] * d["own"] if c.chance(0.3) else None
    return d


def _layer(c: Any, op: str) -> dict[str, Any]:
    block = c.pick((1, 1, 16, 32)) if op == "SparseLinear" else 1
    size = (lambda: block * c.whole(1, 3)) if block > 1 else (lambda: c.pick(LAYER_SIZES))
    return dict(
        shape=c.pick(([1], [3], [2, 3], [0], [], [1, 1, 7], [12], [13], [33], [2, 0])),
        out=size(),
        in_=size(),
        block=block,
        density=c.pick((0.3, 0.0, 1.0, 0.05, 0.7)),
        bias=c.chance(0.6),
        pattern=c.pick(("auto", "dense", "unstructured", f"block{block}" if block > 1 else "unstructured")),
        packed=c.chance(0.3),
    )


def embeddings(d: dict[str, Any], rows: int, width: int, others: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Two matrices of the problem's dtype: (rows, width) and (others, width)."""
    dtype = DTYPES[d["dtype"]]
    most = {torch.float16: 1e3, torch.float64: 1e150}.get(dtype, 1e30)
    if kind in ("small", "large"):  # of norms that square to nothing, or to infinity
        factor = most if kind == "large" else 1e-2 if dtype == torch.float16 else 1e-8
        z1, z2 = (z * factor for z in Case(rows, others, width, seed=seed).embeddings())
    elif kind == "equal":
        row = Case(1, 1, width, seed=seed).embeddings()[0]
        z1, z2 = row.repeat(rows, 1), row.repeat(others, 1)
    elif kind in ("nothing", "constant rows"):
        z1, z2 = (torch.zeros(n, width, dtype=torch.float64) for n in (rows, others))
        if kind == "constant rows":
            z1, z2 = (z + torch.linspace(-1, 2, z.shape[0], dtype=torch.float64)[:, None] for z in (z1, z2))
    elif kind == "sliding":  # each row is the one before, moved by one: rows that overlap in memory
        line = torch.randn(
            max(rows, others) + width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        z1, z2 = line.as_strided((rows, width), (1, 1)).clone(), line.as_strided((others, width), (1, 1)).clone()
    elif kind == "shared":  # the keys are rows of the same memory, from one of the queries on
        z1, _ = Case(rows + others, 1, width, seed=seed).embeddings()
        z1, z2 = z1[:rows].clone(), z1[shared_from(d) :][:others].clone()
    elif kind == "not finite":
        z1, z2 = (z.clone() for z in Case(rows, others, width, seed=seed).embeddings())
        value = (math.nan, math.inf, -math.inf)[seed % 3]
        (z1, z2)[seed // 3 % 2][-1, seed % width] = value
    else:
        z1, z2 = Case(rows, others, width, kind=kind, seed=seed).embeddings(dtype)
    return z1.to(dtype), z2.to(dtype)


def shared_from(d: dict[str, Any]) -> int:
    return d["seed"] % (d["B"] + 1)


@dataclass
class Problem:
    d: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # may require grad
    others: dict[str, Any] = field(default_factory=dict)  # tensors that do not, and what goes with a batch
    options: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    # False where a rounding decides which group a teacher's similarity is in, or which key is excluded: values of two
    # correct programs then differ, and only finiteness, shapes and types are looked at.
    settled: bool = True

    @property
    def op(self) -> str:
        return self.d["op"]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.d["dtype"]]

    @property
    def types(self) -> set[torch.dtype]:
        """Of the student and its teachers: similarities are as coarse as the embeddings that they come from."""
        return {self.dtype, *(e.dtype for e in self.others.get("teachers", ()))}

    @property
    def finite(self) -> bool:
        return self.d["kind"] != "not finite"

    @property
    def embeddings(self) -> tuple[str, ...]:
        """What autocast casts and normalisation applies to."""
        return tuple(n for n in ("z1", "z2", "z", "x", "y", "bias") if n in self.inputs) + (
            ("weight",) if self.mask is not None else ()
        )

    def call(self, inputs: dict[str, Any], others: dict[str, Any], backend: str, module: bool = False) -> Tensor:
        """What is differentiated: the loss, or a layer's result."""
        given = {**inputs, **others}
        if self.op == "SparseLinear" and backend != "reference":
            return self.layer(given, backend)(given["x"])
        if self.mask is not None:
            return masked_linear(given["x"], given["weight"], given["mask"], given.get("bias"), backend=backend)
        options = {**self.options, "backend": backend}
        if isinstance(given.get("seed"), int) and self.d["draw"][0] == "generator":
            given["seed"] = torch.Generator("cpu").manual_seed(given["seed"] % 2**63)
        if module and self.op in MODULES:
            own = {n: given.pop(n) for n in ("temperature", "m") if n in given}
            result = MODULES[self.op](**own, **options)(**given)
        else:
            result = FUNCTIONS[self.op](**given, **options)
        return result.loss if self.op == "distillcse" else result

    def layer(self, given: dict[str, Any], backend: str) -> SparseLinear:
        """Of the given weights themselves, whose gradients are looked at."""
        weight, mask, bias = given["weight"], given["mask"], given.get("bias")
        pattern, dtype = self.d["pattern"], weight.dtype
        made = SparseLinear(
            *reversed(weight.shape),
            bias is not None,
            mask=mask,
            pattern=pattern,
            backend=backend,
            dtype=dtype,
            device="cpu",
        )
        del made.weight, made.bias
        made.weight, made.bias = weight, bias
        return made

    @cached_property
    def upstream(self) -> Tensor:
        """The gradient of what is differentiated, in float64: not 1, and of every row another."""
        shape = self.truth_shape
        n = math.prod(shape)
        ramp = (
            torch.linspace(0.5, 3, n, dtype=torch.float64)
            if self.d.get("ramp", True)
            else torch.full((n,), -1.5).double()
        )
        return ramp.reshape(shape)

    @property
    def truth_shape(self) -> tuple[int, ...]:
        if self.mask is not None:
            return (*self.d["shape"], self.d["out"])
        return (self.d["B"],) if self.d.get("reduction") == "none" else ()

    def outcome(self, dtype: torch.dtype | None = None, shake: int | None = None) -> dict[str, Tensor]:
        """Value and gradients of the reference at a dtype. ``shake`` moves every input by up to half an ulp of the
        problem's."""
        leaves = {}
        for name, value in self.inputs.items():
            value = value if dtype is None else value.to(dtype) if name in self.embeddings else value.double()
            if shake is not None:
                g = torch.Generator().manual_seed(shake)
                noise = torch.rand(value.shape, generator=g, dtype=torch.float64) - 0.5
                value = value * (1 + noise * torch.finfo(self.dtype).eps).to(value.dtype)
            leaves[name] = value.detach().clone().requires_grad_()
        others = {n: v.to(dtype) if dtype and n in ("teacher_logits",) else v for n, v in self.others.items()}
        if dtype is not None and "teachers" in others:
            others["teachers"] = [e.to(dtype) for e in others["teachers"]]
        loss = self.call(leaves, others, "reference")
        gradients = torch.autograd.grad(loss, list(leaves.values()), self.upstream.to(loss.dtype), allow_unused=True)
        result = {"value": loss.detach()}
        for (name, leaf), g in zip(leaves.items(), gradients):
            result[name] = torch.zeros_like(leaf) if g is None else g
        return {name: t.double() for name, t in result.items()}

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        return self.outcome(torch.float64)

    @cached_property
    def eager(self) -> dict[str, Tensor]:
        return self.outcome()

    @cached_property
    def shaken(self) -> list[dict[str, Tensor]]:
        return [self.outcome(torch.float64, shake=k) for k in range(4)]

    @cached_property
    def steepest(self) -> float:
        """The largest slope of a logit over a similarity, times the largest similarity."""
        d, found = self.d, 1.0
        if self.op == "uniformity":
            found = 2 * d["t"]
        if "temperature" in d:
            found = (2 * self.range + abs(d["m"][0]) if d["focal"] else 1) / d["temperature"][0]
            found *= 2 if self.op == "adapacse" else 1  # |cos(phi) - s sin(phi) / sin(theta)|, settled
        return self.range * (max(found, 1 / d["student"], 1 / d["teacher"]) if "student" in d else found)

    @cached_property
    def range(self) -> float:
        """The largest similarity: 1, unless rows are taken as they are."""
        if self.d["normalize"]:
            return 1.0
        return max(
            1.0, *(self.inputs[n].double().nan_to_num(1, 1, 1).square().sum(1).max().item() for n in self.embeddings)
        )

    @cached_property
    def total(self) -> float:
        """What the rows' losses are multiplied by, in all."""
        factor = max(1.0, abs(self.d.get("factor", 1.0)))
        if self.d["reduction"] == "mean":
            return factor * self.upstream.abs().max().item()
        weight = self.inputs.get("weight", torch.ones(self.d["B"])).double()
        return factor * max(1.0, (weight * self.upstream).abs().sum().item())

    @property
    def rounding(self) -> float:
        """How far a similarity that is rounded once moves a logit, and with that a loss and, relatively, a gradient.

        Eager rounds the positive's similarity as it rounds the others, so where all are alike its errors cancel by
        luck.
        """
        if self.mask is not None or self.op == "alignment":
            return 0.0
        # A bfloat16 similarity is a float32 sum that is rounded once, by a quarter of eps where it is near 1.
        one = max(torch.finfo(t).eps * (0.25 if t == torch.bfloat16 else 1) for t in self.types)
        return min(0.5, self.steepest * self.parallel * one)

    @property
    def parallel(self) -> int:
        """How many roundings add up: of two unit rows and their product, where rows are so alike that none averages
        out."""
        return 3 if self.d["D"] <= 2 or self.d["kind"] in ("equal", "constant rows") else 1

    @cached_property
    def norms(self) -> dict[str, Tensor]:
        """Of rows: a gradient through a normalisation is as long as 1/norm, and judged by dL/dzhat."""
        if not self.d.get("normalize", False):
            return {}
        found = {}
        for name in self.embeddings:
            length = self.inputs[name].double().norm(dim=1, keepdim=True)
            found[name] = torch.where(length > 1e-12, length, 1)
        return found

    @cached_property
    def sizes(self) -> dict[str, Tensor]:
        """How large terms are that may cancel: below it, an error counts absolutely."""
        if self.mask is None:
            if "temperature" not in self.d:
                return {}
            # A panel of 16 bits has rounded every logit; in others what cancels is mostly smaller.
            one = torch.tensor(
                self.total * (1 if min(t.itemsize for t in self.types) == 2 else 0.1), dtype=torch.float64
            )
            tau = self.d["temperature"][0]
            return {
                "temperature": one * self.range / tau**2 * (1 + abs(self.d.get("m", (0,))[0])),
                "m": one * self.range / tau,
            }
        x, w = self.inputs["x"].double().abs(), self.inputs["weight"].double().abs().masked_fill(~self.mask, 0)
        dy, rows = self.upstream.abs().reshape(-1, w.shape[0]), x.reshape(-1, w.shape[1])
        y = rows @ w.t() + (self.inputs["bias"].double().abs() if "bias" in self.inputs else 0)
        found = {"value": y, "x": dy @ w, "weight": (dy.t() @ rows).masked_fill(~self.mask, 0), "bias": dy.sum(0)}
        return {name: t.norm() for name, t in found.items()}


def make(d: dict[str, Any]) -> Problem:
    p = Problem(d)
    if d["op"] in ("masked_linear", "SparseLinear"):
        _make_layer(p)
        return p
    B, D = d["B"], d["D"]
    if d["op"] != "adapacse":
        p.options["normalize"] = d["normalize"]
    first, second = embeddings(d, B, D, d.get("N", B), d["kind"], d["seed"])
    if not d["normalize"] and d["kind"] not in ("unit", "nothing", "equal", "zeros"):
        # Dot products in the hundreds at most: beyond, every dtype has lost the loss.
        factor = 2 / max(
            1.0, first.double().nan_to_num(1, 1, 1).abs().max(), second.double().nan_to_num(1, 1, 1).abs().max()
        )
        first, second = (first.double() * factor).to(p.dtype), (second.double() * factor).to(p.dtype)
    if d["op"] == "uniformity":
        p.inputs["x"] = first
        p.options["t"] = d["t"]
        return p
    if d["op"] == "alignment":
        p.inputs |= dict(x=first, y=second)
        return p
    p.inputs |= {"z": first} if d["op"] == "distill" else {"z1": first, "z2": second}
    p.options["reduction"] = d["reduction"]
    if d["op"] != "distill":
        _make_contrastive(p)
    if d["op"] == "adapacse":
        _make_angular(p)
    elif d["op"] != "infonce" and d["op"] != "focal":
        _make_distillation(p, first)
    if d["weight"]:
        p.inputs["weight"] = torch.linspace(0.25, 2, B, dtype=torch.float64).to(DTYPES[d["weight"]])
        if d["seed"] % 2:
            p.inputs["weight"][0] = 0.0 if B > 1 else 1.0
    return p


def _make_contrastive(p: Problem) -> None:
    d, (B, N) = p.d, (p.d["B"], p.d["N"])
    g = torch.Generator().manual_seed(d["seed"])
    for name in ("temperature", "m"):
        if name in d:
            value, kind = d[name]
            if kind == "number":
                p.options[name] = value
            else:
                p.inputs[name] = torch.tensor(value, dtype=DTYPES[kind])
    if d["op"] != "adapacse":
        p.options |= dict(symmetric=d["symmetric"], hard_negative_weight=d["hard"])
    if d["positives"]:
        p.others["positives"] = torch.randint(0, N, (B,), generator=g).to(getattr(torch, d["positives"]))
    if d["ids"]:
        dtype, groups = getattr(torch, d["ids"][0]), d["ids"][1]
        p.others["query_ids"] = torch.randint(0, groups, (B,), generator=g).to(dtype)
        p.others["key_ids"] = torch.randint(0, groups, (N,), generator=g).to(dtype)
    if d["exclude"] is not None:
        p.options["exclude_above"] = d["exclude"]
        p.settled = _far_from_threshold(p)


def _far_from_threshold(p: Problem) -> bool:
    z1, z2 = p.inputs["z1"].double(), p.inputs["z2"].double()
    if p.d["normalize"]:
        z1, z2 = normalized(z1), normalized(z2)
    s = z1 @ z2.t()
    j = p.others["positives"].long() if "positives" in p.others else torch.arange(s.shape[0])
    gap = s - s.gather(1, j[:, None]) - p.d["exclude"]
    if p.d["symmetric"]:
        gap = torch.cat([gap, s - s.diagonal() - p.d["exclude"]])
    wide = {torch.bfloat16: 0.05, torch.float16: 5e-3}.get(p.dtype, 1e-5) * max(1, s.abs().max())
    return bool((gap.abs() > wide).all())


def _make_angular(p: Problem) -> None:
    d, (B, N) = p.d, (p.d["B"], p.d["N"])
    g = torch.Generator().manual_seed(d["seed"] + 2)
    new = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    if d["guides"]:  # float64: a product of their own is rounded as its panels are cut
        p.others["guides"] = [(new(B, width), new(N, width)) for width in d["guides"]]
    else:
        p.others["guide_logits"] = new(B, N).to(DTYPES[d["logits"]])
    z1, z2 = (normalized(p.inputs[name].double()) for name in ("z1", "z2"))
    s, m = z1 @ z2.t(), d["m"][0]
    wide, ends = {torch.bfloat16: (0.02, 0.2), torch.float16: (5e-3, 0.05)}.get(p.dtype, (1e-5, 0.01))
    # No pair near the jump at theta = m, none where a rounding of s is a large part of sin(theta).
    p.settled = m == 0 or bool((((s - math.cos(m)).abs() > wide) & (s.abs() < 1 - ends)).all())


def _make_distillation(p: Problem, z: Tensor) -> None:
    d, B = p.d, p.d["B"]
    g = torch.Generator().manual_seed(d["seed"] + 1)
    if d["teachers"] or d["own"]:
        p.others["teachers"] = [
            embeddings(d | dict(dtype=dtype), B, width, B, kind, d["seed"] + k)[0]
            for k, (width, dtype, kind) in enumerate(d["teachers"])
        ]
        if d["own"]:
            p.others["teachers"].append(z.detach().clone())
        if d["weights"] and sum(d["weights"]) > 0:
            p.options["teacher_weights"] = list(d["weights"])
    else:  # on a grid, where every way of computing the groups agrees
        p.others["teacher_logits"] = (torch.randint(-30, 60, (B, B), generator=g).double() / 64).to(DTYPES[d["logits"]])
    p.options |= dict(
        student_temperature=d["student"], teacher_temperature=d["teacher"], shuffle=d["shuffle"],
        divergence=d["divergence"],
        group_temperature=d["group_temperature"],
    )  # fmt: skip
    if d["op"] == "distillcse":
        p.options["distill_weight"] = d["factor"]
        if not d["focal"]:
            p.options["m"] = None
    kind, size = d["grouping"]
    if kind == "span":
        if B > 2:
            p.options["span"] = (d["seed"] % (B - 2), min(B - 1, d["seed"] % (B - 2) + size))
    elif kind:
        p.options[kind] = size
    if d["shuffle"] == "sample":
        how, seed = d["draw"]
        p.others["seed"] = (
            torch.tensor(seed if seed < 2**63 else seed - 2**64, dtype=torch.int64) if how == "tensor" else seed
        )
        if how == "generator":
            p.others["seed"] = seed % 2**63
    if d["shuffle"] != "none" and B > 2:
        p.settled = p.settled and _groups_hold(p)


def _groups_hold(p: Problem) -> bool:
    """Whether the teachers' groups stay as they are when similarities move by their rounding."""
    B, o = p.d["B"], p.options
    cut = _grouping(o.get("group_p"), o.get("group_size"), o.get("span"))
    if "teacher_logits" in p.others:
        t, noise = p.others["teacher_logits"].double(), 0.0
    else:
        weights = o.get("teacher_weights") or [1.0] * len(p.others["teachers"])
        units = [normalized(e.double()) for e in p.others["teachers"]]
        t = sum(w / sum(weights) * (u @ u.t()) for w, u in zip(weights, units))
        coarse = any(e.dtype == torch.bfloat16 for e in p.others["teachers"])
        noise = 2e-2 if coarse else 1e-12 if p.dtype == torch.float64 else 3e-6
        if all(e.dtype == torch.float64 for e in p.others["teachers"]) and p.dtype == torch.float64:
            noise = 1e-12
    found = []
    for k in range(4):
        g = torch.Generator().manual_seed(k)
        moved = t if k == 0 else t + noise * (2 * torch.rand(B, B, generator=g, dtype=torch.float64) - 1)
        near = cut if k == 0 or cut.kind != "mass" else cut._replace(value=min(1.0, cut.value * (1 + (k - 2) * 1e-5)))
        found.append(grouping.groups(moved, 0, near, float(o["group_temperature"])))
    return all(torch.equal(found[0], other) for other in found[1:])


def _make_layer(p: Problem) -> None:
    d = p.d
    g = torch.Generator().manual_seed(d["seed"])
    new = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    out, in_, block = d["out"], d["in_"], d["block"]
    kept = torch.rand(out // block, in_ // block, generator=g) < d["density"]
    p.mask = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    x, weight, bias = new(*d["shape"], in_), new(out, in_), new(out)
    if d["kind"] in ("small", "large") and p.dtype != torch.float16:
        x = x * (1e15 if d["kind"] == "large" else 1e-15)
    elif d["kind"] in ("nothing", "zeros"):
        x = x * 0
    elif d["kind"] == "not finite" and x.numel():
        x.view(-1, in_)[-1, d["seed"] % in_] = (math.nan, math.inf, -math.inf)[d["seed"] % 3]
    if d["op"] == "masked_linear" and d["seed"] % 2:
        weight = weight.masked_fill(~p.mask, math.nan)  # which nothing may let through
    p.inputs |= dict(x=x.to(p.dtype), weight=weight.to(p.dtype))
    if d["bias"]:
        p.inputs["bias"] = bias.to(p.dtype)
    p.others["mask"] = pack_mask(p.mask) if d["packed"] and d["op"] == "masked_linear" else p.mask


Maker = Callable[[dict[str, Any]], Problem]
