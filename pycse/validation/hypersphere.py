"""Checks of alignment and uniformity."""

from __future__ import annotations

from typing import Any

from pycse.choices import BACKEND_CHOICES
from pycse.validation.checks import choice, embeddings, flag, number, real, same_device, same_dtype

SHARPEST = 1e6  # t of the uniformity


def alignment(x: Any, y: Any, normalize: Any, backend: Any) -> None:
    embeddings("x", x)
    embeddings("y", y)
    if x.shape != y.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)} (row i of both is a pair), got {tuple(y.shape)}")
    same_dtype("x", x, "y", y)
    same_device(x, "x", y=y)
    flag("normalize", normalize)
    choice("backend", backend, BACKEND_CHOICES)


def uniformity(x: Any, t: Any, normalize: Any, backend: Any) -> None:
    embeddings("x", x)
    if x.shape[0] == 1:
        raise ValueError("x must have at least 2 rows (uniformity is over pairs), got shape " + str(tuple(x.shape)))
    real("t", t, positive=True)
    number("t", t)
    if t > SHARPEST:
        raise ValueError(f"t must be at most {SHARPEST:g}, beyond which float32 has no digits of exp(-t d), got {t!r}")
    flag("normalize", normalize)
    choice("backend", backend, BACKEND_CHOICES)
