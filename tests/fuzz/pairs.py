"""Losses of rows and keys: what each is given. Which keys count is in negatives.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuzz import negatives
from fuzz.points import DTYPES, SIZES, number, size
from fuzz.truths import NUMBERS, Problem
from pycse.backends.reference.contrastive import normalized

TEMPERATURES = (0.05, 0.05, 0.01, 0.5, 1, 4.0)
INTEGERS = ("int64", "int32", "int16")
ANY_IDS = (0, 1, -1, 2**62, -(2**63), 2**63 - 1)  # of int64


def contrastive(c: Any, B: int, focal: bool, parts: bool = True) -> dict[str, Any]:
    """``parts``: whether the loss has lists and directions."""
    d: dict[str, Any] = dict(focal=focal, temperature=number(c, TEMPERATURES))
    if focal:
        d["m"] = number(c, (0.3, 0.0, -1.5, 3, 2.0))
    d["symmetric"] = c.chance(0.25)
    d["directions"], d["partition"] = ["qd"], "joint"
    if parts and not d["symmetric"] and c.chance(0.15):
        if c.chance(0.3):
            d["directions"], d["partition"] = ["qd", "dq"], "per_direction"
        else:
            d["directions"] += [name for name in ("dq", "dd", "qq") if c.chance(0.5)]
        if c.chance(0.5):
            d["directions"].reverse()
    directed = len(d["directions"]) > 1
    if directed:
        d["N"] = B * c.whole(1, 3) if "dd" in d["directions"] or c.chance(0.7) else B + c.pick((1, 3))
    else:
        d["N"] = B if d["symmetric"] or c.chance(0.4) else c.pick((B + 1, B + 3, 2 * B, 3 * B, size(c)))
    d["positives"] = None
    if not d["symmetric"] and not directed and (d["N"] < B or c.chance(0.25)):
        d["positives"] = c.pick(("int64", "int32", "uint8"))
    listed = parts and not d["symmetric"] and not directed and c.chance(0.15)
    d["lists"] = (c.pick(INTEGERS[:2]), c.pick((1, 3, 200))) if listed else None
    own = d["N"] > B and d["N"] % B == 0 or listed
    d["hard"] = c.pick((1.5, -2.0, 30.0)) if own and c.chance(0.5) else 0.0
    d["hardness"] = None
    if c.chance(0.2):
        modes = ["all_negatives"] + ["in_batch_negatives"] * (own or d["N"] == B) + ["hard_negatives"] * own
        d["hardness"] = (c.pick((5.0, 0.7, 9)), c.pick(modes))
    d["margin"] = c.pick((0.2, -0.3, 1.5)) if c.chance(0.15) else 0.0
    return d | _ids(c) | negatives.excluded(c) | negatives.guided(c, d["symmetric"] or directed)


def _ids(c: Any, often: float = 0.25) -> dict[str, Any]:
    return dict(ids=(c.pick(INTEGERS), c.whole(1, len(ANY_IDS))) if c.chance(often) else None)


def logsum(c: Any, B: int) -> dict[str, Any]:
    d: dict[str, Any] = dict(temperature=number(c, TEMPERATURES), include=not c.chance(0.4), reduction="none")
    d |= _ids(c) | negatives.excluded(c)
    d["N"] = B if c.chance(0.4) else c.pick((B + 1, 2 * B, size(c), size(c)))
    d["positives"] = None
    speaks = not d["include"] or d["ids"] or d["exclude"]
    if (speaks and d["N"] < B) or c.chance(0.25):
        d["positives"] = c.pick(("int64", "int32", "uint8"))
    return d


def sigmoid(c: Any, B: int) -> dict[str, Any]:
    d: dict[str, Any] = dict(scale=number(c, (10.0, 1, 30.0, 100.0)), bias=number(c, (-10.0, 0.0, 3.5, -100.0)))
    d["N"] = B if c.chance(0.4) else c.pick((B + 1, 2 * B, size(c), size(c)))
    d |= _ids(c, 0.4)
    d["positives"] = None
    if not d["ids"] and (d["N"] < B or c.chance(0.25)):
        d["positives"] = c.pick(("int64", "int32", "uint8"))
    return d


def supcon(c: Any, B: int) -> dict[str, Any]:
    d: dict[str, Any] = dict(temperature=number(c, TEMPERATURES), inside=c.chance(0.4), other=c.chance(0.5))
    d["N"] = B if not d["other"] or c.chance(0.3) else c.pick((1, B + 1, 2 * B, size(c)))
    return d | _ids(c, 1.0)


def angular(c: Any, B: int) -> dict[str, Any]:
    d: dict[str, Any] = dict(temperature=number(c, TEMPERATURES), normalize=True)
    d["m"] = (c.pick((0.1, 0.0, 0.02, 0.7, 1.2, math.pi / 2)), "number")
    d["N"] = B if c.chance(0.4) else c.pick((B + 1, 2 * B, size(c), size(c)))
    d["positives"] = c.pick(("int64", "int32", "uint8")) if d["N"] < B or c.chance(0.25) else None
    d["guides"] = [c.pick(SIZES) for _ in range(c.whole(0, 2))]  # their widths
    return d | _ids(c) | dict(logits=c.pick(tuple(DTYPES)))


def make(p: Problem) -> None:
    """The tensors and options of what was described."""
    d, (B, N) = p.d, (p.d["B"], p.d["N"])
    g = torch.Generator().manual_seed(d["seed"])
    for name in NUMBERS:
        if name in d:
            value, kind = d[name]
            if kind == "number":
                p.options[name] = value
            else:
                p.inputs[name] = torch.tensor(value, dtype=DTYPES[kind])
    if d["op"] == "supcon":
        p.options["inside"] = d["inside"]
        p.others["ids1"], p.others["ids2"] = _made_ids(d, B, g), _made_ids(d, N, g)
        if not d["other"]:
            del p.others["ids2"], p.inputs["z2"]
        return
    if d["positives"]:
        p.others["positives"] = torch.randint(0, N, (B,), generator=g).to(getattr(torch, d["positives"]))
    if d["ids"]:
        p.others["query_ids"], p.others["key_ids"] = _made_ids(d, B, g), _made_ids(d, N, g)
    if d["op"] == "sigmoid":
        p.mass = _mass(p)
        return
    if d["op"] == "adapacse":
        _make_angular(p)
        return
    if d["op"] == "logsum":
        p.options["include_positive"] = d["include"]
    else:
        p.options |= dict(symmetric=d["symmetric"], hard_negative_weight=d["hard"])
        if d.get("margin"):
            p.options["positive_margin"] = d["margin"]
        if d.get("hardness"):
            p.options["hardness"], p.options["hardness_mode"] = d["hardness"]
        if len(d.get("directions", ())) > 1:
            p.options |= dict(directions=d["directions"], partition=d["partition"])
    negatives.make(p, g)


def _made_ids(d: dict[str, Any], n: int, g: torch.Generator) -> Tensor:
    dtype, groups = getattr(torch, d["ids"][0]), d["ids"][1]
    chosen = torch.randint(0, groups, (n,), generator=g)
    return torch.tensor(ANY_IDS)[chosen] if dtype == torch.int64 else chosen.to(dtype)


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


def _mass(p: Problem) -> float:
    """The pairs of a row have probabilities of their own, and may all be wrong."""
    z1, z2 = (p.inputs[n].double().nan_to_num(0, 0, 0) for n in ("z1", "z2"))
    if p.d["normalize"]:
        z1, z2 = normalized(z1), normalized(z2)
    of_negatives = (p.d["scale"][0] * (z1 @ z2.t()) + p.d["bias"][0]).sigmoid()
    mass = torch.maximum(of_negatives, 1 - of_negatives) if "query_ids" in p.others else of_negatives
    return max(1.0, mass.sum(1).max().item())
