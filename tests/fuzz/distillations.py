"""Distillation: its teachers, groups and draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzz.points import DTYPES, KINDS, SIZES, embeddings
from fuzz.truths import Problem
from pycse import grouping
from pycse.backends.reference.contrastive import normalized
from pycse.distillation import _grouping


def describe(c: Any) -> dict[str, Any]:
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


def make(p: Problem, z: Tensor) -> None:
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
