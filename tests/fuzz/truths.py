"""A problem: its tensors and options, the reference's result in float64, and how far from it rounding may lead."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fuzz.points import DTYPES
from pycse import (
    alignment,
    fused_adapacse,
    fused_distill,
    fused_distillcse,
    fused_focal_infonce,
    fused_infonce,
    fused_sigmoid,
    fused_supcon,
    logsumexp_similarities,
    uniformity,
)
from pycse.losses import (
    AdapACSELoss,
    DistillCSELoss,
    DistillLoss,
    FocalInfoNCELoss,
    InfoNCELoss,
    SigmoidLoss,
    SupConLoss,
)
from pycse.sparse import SparseLinear, masked_linear

FUNCTIONS = {
    "infonce": fused_infonce, "focal": fused_focal_infonce, "logsum": logsumexp_similarities, "sigmoid": fused_sigmoid,
    "supcon": fused_supcon, "adapacse": fused_adapacse, "uniformity": uniformity, "alignment": alignment, "distill": fused_distill,
    "distillcse": fused_distillcse, "masked_linear": masked_linear,
}  # fmt: skip
MODULES = {
    "infonce": InfoNCELoss, "focal": FocalInfoNCELoss, "sigmoid": SigmoidLoss, "supcon": SupConLoss,
    "distill": DistillLoss, "distillcse": DistillCSELoss, "adapacse": AdapACSELoss,
}  # fmt: skip
NUMBERS = ("temperature", "m", "scale", "bias")  # that may be trained; a layer's bias is another matter


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
    mass: float = 1.0  # the most that a row's probabilities sum to

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
        names = ("x", "weight", "bias") if self.mask is not None else ("z1", "z2", "z", "x", "y")
        return tuple(n for n in names if n in self.inputs)

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
            own = {n: given.pop(n) for n in NUMBERS if n in given}
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
        """The largest slope of a logit over a similarity, times the largest similarity; with what is added to it."""
        d, found = self.d, 1.0
        if self.op == "uniformity":
            found = 2 * d["t"]
        if "temperature" in d:
            found = (2 * self.range + abs(d["m"][0]) if d.get("focal") else 1) + abs(d.get("margin", 0.0))
            found *= 2 if self.op == "adapacse" else 1  # |cos(phi) - s sin(phi) / sin(theta)|, settled
            found = found / d["temperature"][0] + (d["hardness"][0] if d.get("hardness") else 0)
        if self.op == "sigmoid":
            found = d["scale"][0] + abs(d["bias"][0])
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
        factor = max(1.0, abs(self.d.get("factor", 1.0))) * self.mass
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
            # A panel of 16 bits has rounded every logit; in others what cancels is mostly smaller.
            one = torch.tensor(
                self.total * (1 if min(t.itemsize for t in self.types) == 2 else 0.1), dtype=torch.float64
            )
            if self.op == "sigmoid":
                return {"scale": one * self.range, "bias": one}
            if "temperature" not in self.d:
                return {}
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
