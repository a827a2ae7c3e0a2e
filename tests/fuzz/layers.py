"""Layers with masks: their shapes, and their tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from fuzz.truths import Problem
from pycse.pattern import pack_mask

LAYER_SIZES = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 48, 64, 65, 96)


def describe(c: Any, op: str) -> dict[str, Any]:
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


def make(p: Problem) -> None:
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
