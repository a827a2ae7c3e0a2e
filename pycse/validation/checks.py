"""Checks of one argument. Messages name it, what it was and what is allowed."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from pycse import transforms
from pycse.choices import BACKEND_CHOICES, REDUCTIONS


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def dense(name: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.is_nested:
        what = "a nested tensor; pad it" if t.is_nested else f"{t.layout}; use .to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {what}")


def embeddings(name: str, z: Any) -> tuple[int, int]:
    """How many rows and features these are."""
    if not isinstance(z, Tensor):
        if isinstance(z, transforms.Proxy):
            raise transforms.Symbolic
        raise TypeError(f"{name} must be a torch.Tensor of shape (rows, features), got {what(z)}")
    dense(name, z)
    if z.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, features), got shape {tuple(z.shape)}")
    if not z.dtype.is_floating_point or z.dtype.itemsize == 1:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {z.dtype}")
    rows, features = z.shape
    if rows == 0 or features == 0:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(z.shape)}")
    return rows, features


def same_device(z: Tensor, of: str = "z1", /, **others: Any) -> None:
    device = z.device
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(f"{name} must be on {of}'s device {device}, got {tensor.device}")


def autocast(device: str) -> bool:
    """Whether it is on for a type of device; PyTorch raises where there is none (meta)."""
    return device != "meta" and torch.is_autocast_enabled(device)


def same_dtype(name: str, z: Tensor, other_name: str, other: Tensor) -> None:
    """Autocast makes them alike, but leaves float64 as it is."""
    if z.dtype != other.dtype and (torch.float64 in (z.dtype, other.dtype) or not autocast(z.device.type)):
        raise TypeError(f"{other_name} must have {name}'s dtype {z.dtype}, got {other.dtype}")


def rows_and_keys(z1: Any, z2: Any) -> tuple[int, int]:
    """B and N of two matrices of embeddings that can be multiplied."""
    (B, D), (N, features) = embeddings("z1", z1), embeddings("z2", z2)
    same_dtype("z1", z1, "z2", z2)
    if features != D:
        raise ValueError(f"z2 must have z1's {D} features, got shape {tuple(z2.shape)}")
    return B, N


def _is_number(value: Any) -> bool:
    # bool is a Real; numpy and sympy numbers (torch.compile's symbolic floats) are not always; an array is a number to
    # nobody
    real = isinstance(value, Real) or (hasattr(value, "__float__") and not getattr(value, "shape", ()))
    return real and not isinstance(value, bool)


def real(name: str, value: Any, *, positive: bool = False) -> None:
    """A finite Python number, or a 0-d float tensor (whose value check_values looks at)."""
    if type(value) is float and (0 if positive else -math.inf) < value < math.inf:  # as nearly always: at once
        return
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(f"{name} must be a number or a 0-d float tensor, got {what(value)}")
        return
    if not _is_number(value):
        raise TypeError(f"{name} must be a number or a 0-d float tensor, got {what(value)}")
    allowed = "a finite number > 0" if positive else "a finite number"
    # Comparisons, not math.isfinite: torch.compile with dynamic=True makes these symbols. An integer may be larger than
    # any float.
    most = sys.float_info.max
    if (
        not -math.inf < value < math.inf
        or (type(value) is int and not -most <= value <= most)
        or (positive and not value > 0)
    ):
        raise ValueError(f"{name} must be {allowed}, got {short(value)}")


def vector(name: str, value: Any, length: int, kind: str) -> None:
    """None, or a 1-d tensor of ``length``: ids and positives are integers, weights floats."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({length},), got {what(value)}")
    dense(name, value)
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},), got {tuple(value.shape)}")
    if kind == "integer" and (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool):
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
    if kind == "float" and not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor, got {value.dtype}")


def rows_of_keys(
    B: int, N: int, *, positives: Any, query_ids: Any, key_ids: Any, weight: Any, needs_positives: bool = True
) -> None:
    """What says of each row which keys are its positive, and which are like it; and its weight."""
    vector("positives", positives, B, "integer")
    vector("query_ids", query_ids, B, "integer")
    vector("key_ids", key_ids, N, "integer")
    vector("weight", weight, B, "float")
    if (query_ids is None) != (key_ids is None):
        given, missing = ("query_ids", "key_ids") if key_ids is None else ("key_ids", "query_ids")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if needs_positives and positives is None and N < B:
        raise ValueError(f"z2 must have at least z1's {B} rows (row i's positive is key i), got {N}; or pass positives")


def positives_are_keys(positives: Tensor | None, N: int) -> None:
    if positives is None:
        return
    low, high = (x.item() for x in positives.aminmax())
    if low < 0 or high >= N:
        raise ValueError(f"positives must lie in [0, {N - 1}] (keys), got {low if low < 0 else high}")


def positive_number(name: str, t: Tensor) -> float:
    """The (lowest) value of a tensor that must be > 0."""
    value, highest = (x.item() for x in t.aminmax())
    for x in (value, highest):
        if not (math.isfinite(x) and x > 0):
            raise ValueError(f"{name} must be a finite number > 0, got a tensor holding {x!r}")
    return value


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {what(value)}")


def number(name: str, value: Any) -> None:
    if type(value) is float and -math.inf < value < math.inf:
        return
    if isinstance(value, Tensor) or not _is_number(value):
        raise TypeError(f"{name} must be a number, got {what(value)}")
    real(name, value)


def whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):  # numpy's among them
        raise TypeError(f"{name} must be an integer, got {what(value)}")


def fits_64_bits(name: str, value: Any) -> None:
    if not -(2**63) <= int(value) < 2**64:
        raise ValueError(f"{name} must fit 64 bits, got {value!r}")


def matrix(name: str, value: Any, shape: tuple[int, int]) -> None:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor of shape {shape}, got {what(value)}")
    dense(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def weights_of(name: str, weights: Any, count: int, of: str) -> None:
    """None, or a number >= 0 for each of ``count``, with a finite sum."""
    if weights is None:
        return
    if isinstance(weights, Tensor):
        raise TypeError(f"{name} must be numbers, one a {of}, got {what(weights)}; use .tolist()")
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"{name} must be a list of numbers, one a {of}, got {what(weights)}")
    if len(weights) != count:
        raise ValueError(f"{name} must be {count} numbers, one a {of}, got {weights!r}")
    for k, w in enumerate(weights):
        number(f"{name}[{k}]", w)
        if w < 0:
            raise ValueError(f"{name}[{k}] must be >= 0, got {w!r}")
    if not 0 < sum(weights) < math.inf:
        raise ValueError(f"{name} must have a finite sum > 0, got {weights!r}")


def detached(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, and guides and teachers are not trained: pass {name}.detach()")


def seed(value: Any) -> None:
    if value is None or isinstance(value, torch.Generator):
        return
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype != torch.int64:
            raise TypeError(f"seed must be an integer, a 0-d int64 tensor or a torch.Generator, got {what(value)}")
        return
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"seed must be an integer, a 0-d int64 tensor or a torch.Generator, got {what(value)}")
    fits_64_bits("seed", value)


def rows_and_choices(z: Any, name: str, normalize: Any, weight: Any, reduction: Any, backend: Any) -> None:
    """The arguments that every loss has."""
    embeddings(name, z)
    vector("weight", weight, z.shape[0], "float")
    same_device(z, name, weight=weight)
    flag("normalize", normalize)
    choice("reduction", reduction, REDUCTIONS)
    choice("backend", backend, BACKEND_CHOICES)
