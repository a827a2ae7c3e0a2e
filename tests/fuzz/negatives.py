"""Which keys are a row's negatives: bounds, guides and lists; and whether rounding decides about one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzz.points import DTYPES, KINDS, SIZES, embeddings
from fuzz.truths import Problem
from pycse.backends.reference.contrastive import normalized
from pycse.choices import EXCLUDE_BY
from pycse.problem import bound

# How far a similarity may be off, of the largest.
OFF = {torch.bfloat16: 0.05, torch.float16: 5e-3}


def excluded(c: Any) -> dict[str, Any]:
    """A number or a tensor of some type: of a number other distances in each row."""
    if not c.chance(0.25):
        return dict(exclude=None)
    above = c.pick((0.013, -0.497, 0.31, 5.0, -3.0))
    return dict(exclude=(above, "number" if c.chance(0.5) else c.pick(tuple(DTYPES)), c.pick(EXCLUDE_BY)))


def guided(c: Any, none: bool) -> dict[str, Any]:
    d: dict[str, Any] = dict(guides=None, guide_logits=None)
    if none or not c.chance(0.2):
        return d
    if c.chance(0.3):
        d["guide_logits"] = c.pick(tuple(DTYPES))
    else:
        d["guides"] = [(c.pick(SIZES), c.pick(tuple(DTYPES)), c.pick(KINDS[:6])) for _ in range(c.whole(1, 3))]
        d["guide_weights"] = [c.pick((1, 0.5, 3, 0)) for _ in d["guides"]] if c.chance(0.4) else None
    return d | dict(guide_bound=(c.pick((0.0, 0.013, -0.103, 0.31)), c.pick(EXCLUDE_BY)))


def make(p: Problem, g: torch.Generator) -> None:
    """The tensors and options; ``p.settled`` where no key is within rounding of its bound."""
    d = p.d
    if d.get("exclude") is not None:
        above, kind, by = d["exclude"]
        p.options["exclude_by"] = by
        if kind == "number":
            p.options["exclude_above"] = above
        else:
            p.others["exclude_above"] = torch.linspace(above, above + 0.3, d["B"], dtype=torch.float64).to(DTYPES[kind])
        p.settled = p.settled and _far_from_bounds(p)
    if d.get("guides") or d.get("guide_logits"):
        _make_guides(p, g)
    if d.get("lists"):
        p.others["negatives"] = _lists(p, g)


def _positives(p: Problem) -> Tensor:
    if "positives" in p.others:
        return p.others["positives"].long()
    return torch.arange(p.d["B"]).clamp(max=p.d["N"] - 1)


def _off(s: Tensor, at: Tensor, above: float | Tensor, by: str, rounded: float) -> bool:
    """Whether each of the similarities is clear of its row's bound."""
    gap = s - bound(by, above, at)
    return bool((gap.abs() > rounded * (1 + abs(torch.as_tensor(above)))).all())


def _far_from_bounds(p: Problem) -> bool:
    d = p.d
    z1, z2 = p.inputs["z1"].double(), p.inputs["z2"].double()
    if d["normalize"]:
        z1, z2 = normalized(z1), normalized(z2)
    s = z1 @ z2.t()
    at = s.gather(1, _positives(p)[:, None])
    by, above = d["exclude"][2], p.options.get("exclude_above")
    if above is None:
        above = p.others["exclude_above"].double()[:, None]
    seen = [s]
    if d.get("symmetric"):
        seen.append(s.t())
    sides = {"q": z1, "d": z2}
    seen += [sides[a][: d["B"]] @ sides[b].t() for a, b in d.get("directions", ()) if a + b != "qd"]
    wide = OFF.get(p.dtype, 1e-5) * max(1, s.abs().max().item())
    return all(_off(each, at, above, by, wide) for each in seen)


def _make_guides(p: Problem, g: torch.Generator) -> None:
    d, (B, N) = p.d, (p.d["B"], p.d["N"])
    above, by = d["guide_bound"]
    p.options |= dict(guide_above=above, guide_by=by)
    if d["guide_logits"]:
        dtype = DTYPES[d["guide_logits"]]
        t = torch.randint(-30, 60, (B, N), generator=g).double() / 64  # on a grid, where 16 bits are exact
        p.others["guide_logits"] = t.to(dtype)
        off = 1e-6
    else:
        p.others["guides"] = [
            embeddings(d | dict(dtype=dtype), B, width, N, kind, d["seed"] + k)
            for k, (width, dtype, kind) in enumerate(d["guides"])
        ]
        weights = d["guide_weights"] if d["guide_weights"] and sum(d["guide_weights"]) > 0 else None
        if weights:
            p.options["guide_weights"] = list(weights)
        shares = torch.tensor(weights or [1.0] * len(d["guides"]), dtype=torch.float64)
        t = torch.zeros(B, N, dtype=torch.float64)
        for share, (rows, keys) in zip(shares / shares.sum(), p.others["guides"]):
            t += share * (normalized(rows.double()) @ normalized(keys.double()).t())
        off = 1e-5
    p.settled = p.settled and _off(t, t.gather(1, _positives(p)[:, None]), above, by, off)


def _lists(p: Problem, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys that are no row's positive, up to so many a row, in no order; some in several lists."""
    kind, most = p.d["lists"]
    free = torch.ones(p.d["N"], dtype=torch.bool)
    free[_positives(p)] = False
    keys = free.nonzero().squeeze(1)
    counts = torch.randint(0, min(most, len(keys)) + 1, (p.d["B"],), generator=g)
    index = [keys[torch.randperm(len(keys), generator=g)[: int(n)]] for n in counts]
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    dtype = getattr(torch, kind)
    return ptr.to(dtype), torch.cat(index).to(dtype)
