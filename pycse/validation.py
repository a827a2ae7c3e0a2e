"""Every check of user input, before any work. Messages name the argument, what it was and what is allowed."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from pycse import transforms
from pycse.backends import CHOICES
from pycse.problem import DIVERGENCES, REDUCTIONS, SHUFFLES


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def dense(name: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.is_nested:
        what = "a nested tensor; pad it" if t.is_nested else f"{t.layout}; use .to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {what}")


def embeddings(name: str, z: Any) -> None:
    if not isinstance(z, Tensor):
        if isinstance(z, transforms.Proxy):
            raise transforms.Symbolic
        raise TypeError(f"{name} must be a torch.Tensor of shape (rows, features), got {_what(z)}")
    dense(name, z)
    if z.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, features), got shape {tuple(z.shape)}")
    if not z.dtype.is_floating_point or z.dtype.itemsize == 1:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {z.dtype}")
    if z.shape[0] == 0 or z.shape[1] == 0:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(z.shape)}")


def same_device(z: Tensor, of: str = "z1", /, **others: Any) -> None:
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tensor.device != z.device:
            raise ValueError(f"{name} must be on {of}'s device {z.device}, got {tensor.device}")


def autocast(device: str) -> bool:
    """Whether it is on for a type of device; PyTorch raises where there is none (meta)."""
    return device != "meta" and torch.is_autocast_enabled(device)


def same_dtype(name: str, z: Tensor, other_name: str, other: Tensor) -> None:
    """Autocast makes them alike, but leaves float64 as it is."""
    if z.dtype != other.dtype and (torch.float64 in (z.dtype, other.dtype) or not autocast(z.device.type)):
        raise TypeError(f"{other_name} must have {name}'s dtype {z.dtype}, got {other.dtype}")


def _is_number(value: Any) -> bool:
    # bool is a Real; numpy and sympy numbers (torch.compile's symbolic floats) are not always; an array is a number to
    # nobody
    real = isinstance(value, Real) or (hasattr(value, "__float__") and not getattr(value, "shape", ()))
    return real and not isinstance(value, bool)


def real(name: str, value: Any, *, positive: bool = False) -> None:
    """A finite Python number, or a 0-d float tensor (whose value check_values looks at)."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(f"{name} must be a number or a 0-d float tensor, got {_what(value)}")
        return
    if not _is_number(value):
        raise TypeError(f"{name} must be a number or a 0-d float tensor, got {_what(value)}")
    allowed = "a finite number > 0" if positive else "a finite number"
    # Comparisons, not math.isfinite: torch.compile with dynamic=True makes these symbols. An integer may be larger than
    # any float.
    most = sys.float_info.max
    if (
        not -math.inf < value < math.inf
        or (type(value) is int and not -most <= value <= most)
        or (positive and not value > 0)
    ):
        raise ValueError(f"{name} must be {allowed}, got {_short(value)}")


def vector(name: str, value: Any, length: int, kind: str) -> None:
    """None, or a 1-d tensor of ``length``: ids and positives are integers, weights floats."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({length},), got {_what(value)}")
    dense(name, value)
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},), got {tuple(value.shape)}")
    if kind == "integer" and (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool):
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
    if kind == "float" and not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor, got {value.dtype}")


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_what(value)}")


def contrastive(
    z1: Any,
    z2: Any,
    temperature: Any,
    m: Any,
    positives: Any,
    hard_negative_weight: Any,
    query_ids: Any,
    key_ids: Any,
    exclude_above: Any,
    symmetric: Any,
    normalize: Any,
    weight: Any,
    reduction: Any,
    backend: Any,
    validate: Any,
) -> None:
    """Everything that can be checked without reading a tensor's values."""
    embeddings("z1", z1)
    embeddings("z2", z2)
    same_dtype("z1", z1, "z2", z2)
    (B, D), N = z1.shape, z2.shape[0]
    if z2.shape[1] != D:
        raise ValueError(f"z2 must have z1's {D} features, got shape {tuple(z2.shape)}")
    real("temperature", temperature, positive=True)
    real("m", m)
    vector("positives", positives, B, "integer")
    vector("query_ids", query_ids, B, "integer")
    vector("key_ids", key_ids, N, "integer")
    vector("weight", weight, B, "float")
    same_device(
        z1,
        z2=z2,
        temperature=temperature,
        m=m,
        positives=positives,
        query_ids=query_ids,
        key_ids=key_ids,
        weight=weight,
    )
    if positives is None and N < B:
        raise ValueError(f"z2 must have at least z1's {B} rows (row i's positive is key i), got {N}; or pass positives")
    if (query_ids is None) != (key_ids is None):
        given, missing = ("query_ids", "key_ids") if key_ids is None else ("key_ids", "query_ids")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    for name, value in (("hard_negative_weight", hard_negative_weight), ("exclude_above", exclude_above)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number, got {_what(value)}")
    real("hard_negative_weight", hard_negative_weight)
    if exclude_above is not None:
        real("exclude_above", exclude_above)
    flag("symmetric", symmetric)
    flag("normalize", normalize)
    if normalize:  # else similarities may be as small as the temperature
        resolvable(z1, temperature, m, hard_negative_weight)
    flag("validate", validate)
    if hard_negative_weight != 0 and (N % B != 0 or N == B):
        raise ValueError(
            f"hard_negative_weight needs K >= 1 hard negatives a row, N = (K + 1) B keys; got N = {N}, B = {B}"
        )
    if symmetric:
        if N != B:
            raise ValueError(f"symmetric=True needs as many keys as rows, got z1 with {B} and z2 with {N}")
        if positives is not None:
            raise ValueError("symmetric=True needs the default positives (row i, key i); got positives as well")
    choice("reduction", reduction, REDUCTIONS)
    choice("backend", backend, CHOICES)


# Logits beyond this are noise: float32 similarities are off by 1e-7, and that over the temperature.
LARGEST_LOGIT = {torch.float64: 1e12}
LEAST_TEMPERATURE = 1e-12  # of a distillation, whose logits are differences from the row's maximum
SHARPEST = 1e6  # t of the uniformity


def resolvable(z: Tensor, temperature: Any, m: Any, hard_negative_weight: float = 0.0) -> None:
    """That numbers (tensors are looked at later, if at all) do not make logits which are rounding errors."""

    def number(x: Any, otherwise: float) -> Any:
        if isinstance(x, Tensor):
            return otherwise
        return x if isinstance(x, (torch.SymFloat, torch.SymInt)) else float(x)  # a symbol would be fixed

    largest = LARGEST_LOGIT.get(z.dtype, 1e6)
    logit = (1 + abs(number(m, 0.0))) / number(temperature, 1.0) + max(number(hard_negative_weight, 0.0), 0)
    if logit > largest:
        raise ValueError(
            f"temperature must be larger, or m or hard_negative_weight smaller: (1 + |m|) / temperature + hard_negative_weight "
            f"may be {largest:g} at most for {z.dtype} embeddings, which resolve no larger logits; it is {logit:g} "
            f"(temperature={temperature!r}, m={m!r}, hard_negative_weight={hard_negative_weight!r})"
        )


def rows_and_choices(z: Any, name: str, normalize: Any, weight: Any, reduction: Any, backend: Any) -> None:
    """The arguments that every loss has."""
    embeddings(name, z)
    vector("weight", weight, z.shape[0], "float")
    same_device(z, name, weight=weight)
    flag("normalize", normalize)
    choice("reduction", reduction, REDUCTIONS)
    choice("backend", backend, CHOICES)


def check_values(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | None,
    m: Tensor | None,
    weight: Tensor | None,
    positives: Tensor | None,
    focal: bool,
    normalize: bool,
) -> None:
    """What only the tensors' values show. On a GPU this waits for the device, hence only with validate=True."""
    if temperature is None and m is None and positives is None:
        return
    temperature, m, positives = (None if transforms.batched(t) else t for t in (temperature, m, positives))
    if temperature is not None:
        value = temperature.item()
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"temperature must be a finite number > 0, got a tensor holding {value!r}")
    if m is not None and focal:
        value = m.item()
        if not math.isfinite(value):
            raise ValueError(f"m must be a finite number, got a tensor holding {value!r}")
    if temperature is not None or m is not None:
        numbers = (1.0 if temperature is None else temperature.item(), m.item() if m is not None and focal else 0.0)
        if normalize:
            resolvable(z1, *numbers)
    if positives is not None:
        low, high = (x.item() for x in positives.aminmax())
        if low < 0 or high >= z2.shape[0]:
            bad = low if low < 0 else high
            raise ValueError(f"positives must lie in [0, {z2.shape[0] - 1}] (keys), got {bad}")


DISTILLATION_OPTIONS = (
    "distill_weight",
    "student_temperature",
    "teacher_temperature",
    "group_temperature",
    "group_p",
    "group_size",
    "span",
    "shuffle",
    "divergence",
)


def distillation_options(
    distill_weight: Any = 1.0,
    student_temperature: Any = 0.025,
    teacher_temperature: Any = 0.0125,
    group_temperature: Any = 1.0,
    group_p: Any = None,
    group_size: Any = None,
    span: Any = None,
    shuffle: Any = "sample",
    divergence: Any = "ce",
) -> None:
    """What does not depend on a batch."""
    for label, value in (
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
        ("group_temperature", group_temperature),
    ):
        number(label, value)
        real(label, value, positive=True)
        if value < LEAST_TEMPERATURE:
            raise ValueError(f"{label} must be at least {LEAST_TEMPERATURE:g}, got {value!r}")
    number("distill_weight", distill_weight)
    choice("shuffle", shuffle, SHUFFLES)
    choice("divergence", divergence, DIVERGENCES)
    given = [name for name, v in (("group_p", group_p), ("group_size", group_size), ("span", span)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other (each says how rows are grouped); give one of them")
    if group_p is not None:
        number("group_p", group_p)
        if not 0 < group_p <= 1:
            raise ValueError(f"group_p (probability mass of a group) must lie in (0, 1], got {group_p!r}")
    if group_size is not None:
        whole("group_size", group_size)
        if group_size < 1:
            raise ValueError(f"group_size (ranks in a group) must be at least 1, got {group_size!r}")
    if span is not None:
        if not isinstance(span, (tuple, list)) or len(span) != 2:
            raise TypeError(f"span must be two integers (start, end), got {_what(span)}")
        for value in span:
            whole("span", value)
        if not 0 <= span[0] < span[1]:
            raise ValueError(f"span must satisfy 0 <= start < end <= B - 1, got {tuple(span)}")


def number(name: str, value: Any) -> None:
    if isinstance(value, Tensor) or not _is_number(value):
        raise TypeError(f"{name} must be a number, got {_what(value)}")
    real(name, value)


def whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):  # numpy's among them
        raise TypeError(f"{name} must be an integer, got {_what(value)}")


def teachers(z1: Tensor, name: str, embedded: Any, logits: Any, weights: Any) -> None:
    """Teachers of z1's batch: embeddings, or their averaged similarities. ``name`` is the caller's for z1."""
    B = z1.shape[0]
    if (embedded is None) == (logits is None):
        both = "both" if logits is not None else "neither"
        raise ValueError(f"give teachers (embeddings) or teacher_logits (averaged similarities), got {both}")
    if logits is not None:
        if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
            raise TypeError(f"teacher_logits must be a float tensor of shape ({B}, {B}), got {_what(logits)}")
        dense("teacher_logits", logits)
        if logits.shape != (B, B):
            raise ValueError(
                f"teacher_logits must have shape ({B}, {B}) for {B} rows of {name}, got {tuple(logits.shape)}"
            )
        if weights is not None:
            raise ValueError("teacher_weights belong to teachers; teacher_logits are averaged already")
        detached("teacher_logits", logits)
        same_device(z1, name, teacher_logits=logits)
        return
    if isinstance(embedded, Tensor) or not isinstance(embedded, (list, tuple)):
        raise TypeError(f"teachers must be a list of embeddings, one (B, D_k) tensor a teacher, got {_what(embedded)}")
    if len(embedded) == 0:
        raise ValueError("teachers must hold at least one teacher's embeddings, got an empty list")
    for k, e in enumerate(embedded):
        embeddings(f"teachers[{k}]", e)
        if e.shape[0] != B:
            raise ValueError(f"teachers[{k}] must have {name}'s {B} rows, got shape {tuple(e.shape)}")
        detached(f"teachers[{k}]", e)
        same_device(z1, name, **{f"teachers[{k}]": e})
    if weights is None:
        return
    if isinstance(weights, Tensor):
        raise TypeError(f"teacher_weights must be numbers, one a teacher, got {_what(weights)}; use .tolist()")
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"teacher_weights must be a list of numbers, one a teacher, got {_what(weights)}")
    if len(weights) != len(embedded):
        raise ValueError(f"teacher_weights must be {len(embedded)} numbers, one a teacher, got {weights!r}")
    for k, w in enumerate(weights):
        number(f"teacher_weights[{k}]", w)
        if w < 0:
            raise ValueError(f"teacher_weights[{k}] must be >= 0, got {w!r}")
    if not 0 < sum(weights) < math.inf:
        raise ValueError(f"teacher_weights must have a finite sum > 0, got {weights!r}")


def detached(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, and teachers are not trained: pass {name}.detach()")


def seed(value: Any) -> None:
    if value is None or isinstance(value, torch.Generator):
        return
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype != torch.int64:
            raise TypeError(f"seed must be an integer, a 0-d int64 tensor or a torch.Generator, got {_what(value)}")
        return
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"seed must be an integer, a 0-d int64 tensor or a torch.Generator, got {_what(value)}")
    fits_64_bits("seed", value)


def fits_64_bits(name: str, value: Any) -> None:
    if not -(2**63) <= int(value) < 2**64:
        raise ValueError(f"{name} must fit 64 bits, got {value!r}")


def distillation(
    z1: Tensor,
    name: str,
    embedded: Any,
    teacher_logits: Any,
    teacher_weights: Any,
    distill_weight: Any,
    student_temperature: Any,
    teacher_temperature: Any,
    group_temperature: Any,
    group_p: Any,
    group_size: Any,
    span: Any,
    shuffle: Any,
    divergence: Any,
    seed_value: Any,
) -> None:
    teachers(z1, name, embedded, teacher_logits, teacher_weights)
    distillation_options(
        distill_weight, student_temperature, teacher_temperature, group_temperature, group_p, group_size, span, shuffle,
        divergence,
    )  # fmt: skip
    B = z1.shape[0]
    if span is not None and B > 1 and span[1] > B - 1:
        raise ValueError(f"span must satisfy 0 <= start < end <= B - 1 = {B - 1}, got {tuple(span)}")
    seed(seed_value)
    same_device(z1, name, seed=seed_value)


def alignment(x: Any, y: Any, normalize: Any, backend: Any) -> None:
    embeddings("x", x)
    embeddings("y", y)
    if x.shape != y.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)} (row i of both is a pair), got {tuple(y.shape)}")
    same_dtype("x", x, "y", y)
    same_device(x, "x", y=y)
    flag("normalize", normalize)
    choice("backend", backend, CHOICES)


def uniformity(x: Any, t: Any, normalize: Any, backend: Any) -> None:
    embeddings("x", x)
    if x.shape[0] == 1:
        raise ValueError("x must have at least 2 rows (uniformity is over pairs), got shape " + str(tuple(x.shape)))
    real("t", t, positive=True)
    number("t", t)
    if t > SHARPEST:
        raise ValueError(f"t must be at most {SHARPEST:g}, beyond which float32 has no digits of exp(-t d), got {t!r}")
    flag("normalize", normalize)
    choice("backend", backend, CHOICES)


def linear_mask(name: str, mask: Any, weight: Tensor, *, anywhere: bool = False) -> None:
    """A bool mask of the weight's shape, on its device unless ``anywhere``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor of shape {tuple(weight.shape)}, got {_what(mask)}")
    dense(name, mask)
    if mask.shape != weight.shape:
        raise ValueError(f"{name} must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if mask.device != weight.device and not anywhere:
        raise ValueError(f"{name} must be on the weight's device {weight.device}, got {mask.device}")


def packed_mask(name: str, bits: Any, weight: Tensor, *, anywhere: bool = False) -> None:
    """pack_mask's bits of a mask of the weight's shape, on its device unless ``anywhere``."""
    shape = (weight.shape[0], -(-weight.shape[1] // 32))
    if not isinstance(bits, Tensor) or bits.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor of shape {shape}, got {_what(bits)}")
    dense(name, bits)
    if bits.shape != shape:
        raise ValueError(
            f"{name} must be bits of shape {shape} (pack_mask) for a weight {tuple(weight.shape)}, got {tuple(bits.shape)}"
        )
    if bits.device != weight.device and not anywhere:
        raise ValueError(f"{name} must be on the weight's device {weight.device}, got {bits.device}")


def linear(x: Any, weight: Any, bias: Any) -> None:
    """What F.linear needs: x (..., in), weight (out, in), bias (out); one dtype unless autocast casts them."""
    for name, t in (("x", x), ("weight", weight), *((("bias", bias),) if bias is not None else ())):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {_what(t)}")
        if not t.dtype.is_floating_point or t.dtype.itemsize == 1:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
        dense(name, t)
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions (out, in), got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have the weight's {weight.shape[1]} features last, got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    same_device(x, "x", weight=weight, bias=bias)
    if not autocast(x.device.type):
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.dtype != x.dtype:
                raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
