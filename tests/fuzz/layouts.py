"""How a tensor lies in memory, and what state the process is in. Neither may change a value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CPU = "cpu"
# The first is what the others shrink to.
MATRICES = (
    "plain", "offset", "padded", "transposed", "every other column", "every other row", "negative", "expanded rows",
    "expanded columns", "zero tensor", "overlapping rows", "parameter", "subclass",
)  # fmt: skip
VECTORS = ("plain", "offset", "every other", "negative", "expanded", "zero tensor", "parameter")
INTEGERS = ("plain", "offset", "every other", "expanded")


class Subclass(torch.Tensor):
    """Sends calls through the dispatcher."""


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory around a view: what reads it is seen."""
    wrong: Any = torch.nan if dtype.is_floating_point else (True if dtype == torch.bool else 99)
    return torch.full(shape, wrong, dtype=dtype, device=CPU)


def lay(values: Tensor, kind: str, leaf: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A tensor of these values that lies as ``kind`` says, and the memory behind it. A kind that does not fit is
    "plain".

    ``leaf`` is called with what is to require grad.
    """
    shape, dtype = values.shape, values.dtype
    signed = dtype.is_floating_point and dtype.itemsize > 1
    if kind == "parameter" and signed:
        base = torch.nn.Parameter(values.clone(), requires_grad=False)
        return leaf(base), base
    if kind == "subclass" and signed:
        base = values.clone().as_subclass(Subclass)
        return leaf(base), base
    if kind == "zero tensor" and signed and not values.any():
        base = leaf(torch._efficientzerotensor(shape, dtype=dtype, device=CPU))
        return base, base
    if kind == "negative" and signed:
        base = leaf(-values)
        return torch._neg_view(base), base
    if kind == "offset" and values.numel():
        base = leaf_of(poison((values.numel() + 8,), dtype), lambda b: b[5:-3].view(shape), values, leaf)
        return base[5:-3].view(shape), base
    if len(shape) == 1:
        if kind == "every other":
            base = leaf_of(poison((2 * shape[0] + 1,), dtype), lambda b: b[1::2], values, leaf)
            return base[1::2], base
        if kind == "expanded" and shape[0] and (values == values[0]).all():
            base = leaf(values[:1].clone())
            return base.expand(shape), base
    if len(shape) == 2 and values.numel():
        R, C = shape
        if kind == "padded":
            base = leaf_of(poison((R, C + 5), dtype), lambda b: b[:, 2 : 2 + C], values, leaf)
            return base[:, 2 : 2 + C], base
        if kind == "transposed":
            base = leaf(values.t().contiguous())
            return base.t(), base
        if kind == "every other column":
            base = leaf_of(poison((R, 2 * C), dtype), lambda b: b[:, ::2], values, leaf)
            return base[:, ::2], base
        if kind == "every other row":
            base = leaf_of(poison((2 * R + 1, C), dtype), lambda b: b[1::2], values, leaf)
            return base[1::2], base
        if kind == "expanded rows" and (values == values[0]).all():
            base = leaf(values[:1].clone())
            return base.expand(R, C), base
        if kind == "expanded columns" and (values == values[:, :1]).all():
            base = leaf(values[:, :1].clone())
            return base.expand(R, C), base
        if kind == "overlapping rows" and torch.equal(values[1:, :-1], values[:-1, 1:]):
            base = leaf(torch.cat([values[0], values[1:, -1]]))
            return base.as_strided((R, C), (1, 1)), base
    base = leaf(values.clone())
    return base, base


def leaf_of(base: Tensor, part: Callable[[Tensor], Tensor], values: Tensor, leaf: Callable[[Tensor], Tensor]) -> Tensor:
    part(base).copy_(values)
    return leaf(base)


@contextlib.contextmanager
def _setting(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """New memory comes filled with NaN as well."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _dtype(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: _setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def _threads(count: int) -> Callable[[], Any]:
    return lambda: _setting(torch.get_num_threads, torch.set_num_threads, count)


STATES: dict[str, Callable[[], Any]] = {
    "float64 by default": _dtype(torch.float64),
    "bfloat16 by default": _dtype(torch.bfloat16),
    "float16 by default": _dtype(torch.float16),
    "meta context": lambda: torch.device("meta"),
    "meta by default": lambda: _default_device("meta"),
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast(CPU, torch.bfloat16),  # of the problem's dtype, see calls.py
    "deterministic": _deterministic,
    "1 thread": _threads(1),
    "3 threads": _threads(3),
    "4 threads": _threads(4),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "enable grad": torch.enable_grad,
}
