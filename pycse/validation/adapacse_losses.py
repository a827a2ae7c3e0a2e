"""Checks of AdapACSE."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pycse import transforms
from pycse.choices import BACKEND_CHOICES, REDUCTIONS
from pycse.problem import Angular
from pycse.validation.checks import (
    choice,
    flag,
    number,
    positive_number,
    positives_are_keys,
    real,
    rows_and_keys,
    rows_of_keys,
    same_device,
)
from pycse.validation.contrastive_losses import EXCLUSIVE, guide
from pycse.validation.supervised_losses import resolvable


def adapacse(
    z1: Any,
    z2: Any,
    temperature: Any,
    m: Any,
    *,
    guides: Any,
    guide_weights: Any,
    guide_logits: Any,
    positives: Any,
    query_ids: Any,
    key_ids: Any,
    weight: Any,
    **options: Any,
) -> None:
    """Everything that can be checked without reading a tensor's values."""
    B, N = rows_and_keys(z1, z2)
    adapacse_options(temperature, m, **options)
    rows_of_keys(B, N, positives=positives, query_ids=query_ids, key_ids=key_ids, weight=weight)
    tensors = dict(positives=positives, query_ids=query_ids, key_ids=key_ids, weight=weight)
    same_device(z1, z2=z2, temperature=temperature, **tensors)
    guide(z1, z2, guides, guide_weights, guide_logits)
    if guides is None and guide_logits is None:
        raise ValueError("guides or guide_logits must be given (the margins are a teacher's), got None for both")
    if guide_logits is not None:
        for name, value in (("guides", guides), ("guide_weights", guide_weights)):
            if value is not None:
                raise ValueError(
                    f"{name} and guide_logits exclude each other ({EXCLUSIVE[name, 'guide_logits']}); give one of them"
                )
    if not isinstance(temperature, Tensor):
        resolvable(z1, temperature)


def adapacse_options(
    temperature: Any = 0.05,
    m: Any = 0.1,
    *,
    guide_weights: Any = None,  # their number is the batch's
    reduction: Any = "mean",
    backend: Any = "auto",
    validate: Any = False,
) -> None:
    """What does not depend on a batch."""
    real("temperature", temperature, positive=True)
    number("m", m)
    if not 0 <= m <= math.pi / 2:  # a comparison: torch.compile with dynamic=True makes m a symbol
        raise ValueError(f"m must lie between 0 and pi/2 (an angle in radians), got {m!r}")
    choice("reduction", reduction, REDUCTIONS)
    choice("backend", backend, BACKEND_CHOICES)
    flag("validate", validate)


def check_adapacse(p: Angular) -> None:
    """What only the tensors' values show. On a GPU this waits for the device, hence only with validate=True."""
    temperature, positives = (
        t.detach() if isinstance(t, Tensor) and not transforms.batched(t) else None
        for t in (p.temperature, p.positives)
    )
    if temperature is not None:
        resolvable(p.z1, positive_number("temperature", temperature))
    positives_are_keys(positives, p.z2.shape[0])
