"""Embeddings: their types, sizes and kinds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oracle import Case

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
KINDS = (
    "random", "confident", "duplicates", "equal", "zeros", "scales", "opposite", "unit", "small", "large", "nothing",
    "constant rows", "sliding", "shared", "not finite",
)  # fmt: skip
# Beside vectors of 8 and 16, tiles of 32 and 64; most are small, because small calls are many calls.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 33)
LARGER = (63, 64, 65, 97, 130)


def size(c: Any) -> int:
    return c.pick(LARGER) if c.chance(0.06) else c.pick(SIZES)


def number(c: Any, values: tuple[float, ...]) -> tuple[float, str]:
    """A number, and as what it is given: a number or a tensor of some type."""
    return c.pick(values), c.pick(("number", "number", "float32", "float64", "bfloat16"))


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
