"""Checks of a distillation: teachers, temperatures, groups."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from pycse.choices import BACKEND_CHOICES, DIVERGENCES, REDUCTIONS, SHUFFLES
from pycse.validation.checks import (
    choice,
    dense,
    detached,
    embeddings,
    flag,
    number,
    real,
    same_device,
    seed,
    weights_of,
    what,
    whole,
)
from pycse.validation.contrastive_losses import contrastive_options

LEAST_TEMPERATURE = 1e-12  # logits are differences from the row's maximum


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
    teacher_weights: Any = None,  # their number is the batch's
    normalize: Any = True,
    reduction: Any = "mean",
    backend: Any = "auto",
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
    flag("normalize", normalize)
    choice("reduction", reduction, REDUCTIONS)
    choice("backend", backend, BACKEND_CHOICES)
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
            raise TypeError(f"span must be two integers (start, end), got {what(span)}")
        for value in span:
            whole("span", value)
        if not 0 <= span[0] < span[1]:
            raise ValueError(f"span must satisfy 0 <= start < end <= B - 1, got {tuple(span)}")


def teachers(z1: Tensor, name: str, embedded: Any, logits: Any, weights: Any) -> None:
    """Teachers of z1's batch: embeddings, or their averaged similarities. ``name`` is the caller's for z1."""
    B = z1.shape[0]
    if (embedded is None) == (logits is None):
        both = "both" if logits is not None else "neither"
        raise ValueError(f"give teachers (embeddings) or teacher_logits (averaged similarities), got {both}")
    if logits is not None:
        if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
            raise TypeError(f"teacher_logits must be a float tensor of shape ({B}, {B}), got {what(logits)}")
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
        raise TypeError(f"teachers must be a list of embeddings, one (B, D_k) tensor a teacher, got {what(embedded)}")
    if len(embedded) == 0:
        raise ValueError("teachers must hold at least one teacher's embeddings, got an empty list")
    for k, e in enumerate(embedded):
        embeddings(f"teachers[{k}]", e)
        if e.shape[0] != B:
            raise ValueError(f"teachers[{k}] must have {name}'s {B} rows, got shape {tuple(e.shape)}")
        detached(f"teachers[{k}]", e)
        same_device(z1, name, **{f"teachers[{k}]": e})
    weights_of("teacher_weights", weights, len(embedded), "teacher")


def distillation(
    z1: Tensor,
    name: str,
    embedded: Any,
    *,
    teacher_logits: Any,
    teacher_weights: Any,
    seed_value: Any,
    span: Any,
    shared: bool = False,
    **options: Any,
) -> None:
    """shared: by ranks of a group, which look at ``span`` once they know how many rows there are."""
    teachers(z1, name, embedded, teacher_logits, teacher_weights)
    distillation_options(span=span, **options)
    if span is not None and not shared:
        span_of_ranks(span, z1.shape[0])
    seed(seed_value)
    same_device(z1, name, seed=seed_value)


def span_of_ranks(span: Any, B: int) -> None:
    if B > 1 and span[1] > B - 1:
        raise ValueError(f"span must satisfy 0 <= start < end <= B - 1 = {B - 1}, got {tuple(span)}")


def distillcse_options(**options: Any) -> None:
    """What does not depend on a batch, of both parts."""
    of = inspect.signature(distillation_options).parameters
    distillation_options(**{name: x for name, x in options.items() if name in of})
    contrastive = inspect.signature(contrastive_options).parameters
    m = 0.0 if options.get("m") is None else options["m"]
    contrastive_options(**{**{name: x for name, x in options.items() if name in contrastive}, "m": m})
