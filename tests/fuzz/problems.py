"""A problem's description from choices, and the problem from its description."""

from __future__ import annotations

from typing import Any

import torch

from fuzz import distillations, layers, pairs
from fuzz.points import DTYPES, KINDS, embeddings, size
from fuzz.truths import FUNCTIONS, MODULES, Problem

OPS = (*FUNCTIONS, "SparseLinear")
OF_PAIRS = ("infonce", "focal", "logsum", "sigmoid", "supcon", "adapacse", "distillcse")


def describe(c: Any, op: str | None = None) -> dict[str, Any]:
    """A problem's description from choices."""
    # The contrastive losses have as many options as all others together.
    op = op or c.pick((*OPS, "infonce", "focal", "infonce", "focal"))
    d = dict(
        op=op, dtype=c.pick(tuple(DTYPES)), seed=c.whole(0, 9999), kind=c.pick(KINDS) if c.chance(0.6) else "random"
    )
    if op in ("masked_linear", "SparseLinear"):
        return d | layers.describe(c, op)
    d |= dict(B=size(c), D=size(c), normalize=not c.chance(0.15))
    if op == "uniformity":
        return d | dict(B=max(2, d["B"]), t=c.pick((2.0, 0.1, 1, 5.0, 20.0, 20.5, 60.0)))
    if op == "alignment":
        return d
    if op == "logsum":
        return d | pairs.logsum(c, d["B"]) | dict(weight=None, ramp=c.chance(0.7))
    d |= dict(
        reduction=c.pick(("mean", "mean", "sum", "none")), weight=c.pick((None, None, *DTYPES)), ramp=c.chance(0.7)
    )
    if op == "sigmoid":
        return d | pairs.sigmoid(c, d["B"])
    if op == "supcon":
        return d | pairs.supcon(c, d["B"])
    if op == "adapacse":
        return d | pairs.angular(c, d["B"])
    if op in ("distill", "distillcse"):
        d |= distillations.describe(c)
    if op != "distill":
        focal = op == "focal" or (op == "distillcse" and c.chance(0.5))
        d |= pairs.contrastive(c, d["B"], focal, parts=op != "distillcse")
    return d


def make(d: dict[str, Any]) -> Problem:
    p = Problem(d)
    if d["op"] in ("masked_linear", "SparseLinear"):
        layers.make(p)
        return p
    B, D = d["B"], d["D"]
    if d["op"] != "adapacse":  # whose rows always are
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
    if d["op"] != "logsum":
        p.options["reduction"] = d["reduction"]
    if d["op"] in OF_PAIRS:
        pairs.make(p)
    if d["op"] in ("distill", "distillcse"):
        distillations.make(p, first)
    if d["weight"]:
        p.inputs["weight"] = torch.linspace(0.25, 2, B, dtype=torch.float64).to(DTYPES[d["weight"]])
        if d["seed"] % 2:
            p.inputs["weight"][0] = 0.0 if B > 1 else 1.0
    return p


__all__ = ["DTYPES", "FUNCTIONS", "MODULES", "OPS", "Problem", "describe", "make"]
