"""The losses as modules. They hold configuration only; pycse.functional and pycse.distillation do the work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pycse import validation
from pycse.adapacse import fused_adapacse
from pycse.distillation import DistillCSEOutput, fused_distill, fused_distillcse
from pycse.functional import fused_focal_infonce, fused_infonce
from pycse.matryoshka import Drawn
from pycse.sigmoid import fused_sigmoid
from pycse.supervised import fused_supcon

ACROSS = ("group", "exchange", "replicated_keys")  # looked at where a batch comes: groups come and go


class Loss(Drawn, nn.Module):
    """A public function whose options are fixed here, by name; what belongs to a batch is given to ``forward``.

    Beside the function's, where it has ``dims``: ``n_dims_per_step``, how many of the lengths a call takes while the
    module is training and gradients are enabled, drawn anew each time, on all processes alike; None for all.
    """

    function: ClassVar[Callable[..., Any]]
    batch: ClassVar[tuple[str, ...]]  # what belongs to a batch
    numbers: ClassVar[tuple[str, ...]] = ()  # what may be an nn.Parameter, which is registered and trained
    check: ClassVar[Callable[..., None]]  # of options

    def __init__(self, **options: Any) -> None:
        super().__init__()
        names = [n for n in inspect.signature(type(self).function).parameters if n not in self.batch]
        if "dims" in names:
            names.append("n_dims_per_step")
        for name in options:
            if name not in names:
                why = (
                    "belongs to a batch: give it to forward" if name in self.batch else f"is none of {', '.join(names)}"
                )
                raise TypeError(f"option {name!r} {why}")
        checked = self.check_lengths(options)
        type(self).check(**{name: value for name, value in checked.items() if name not in ACROSS})
        for name in self.numbers:
            setattr(self, name, options.pop(name))
        self.options = options

    def fixed(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self.numbers}, **self.options}

    def extra_repr(self) -> str:
        shown = self.fixed() | self.described()
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if not isinstance(value, Tensor))


class InfoNCELoss(Loss):
    """Module form of :func:`pycse.fused_infonce`; see there for formula, arguments and errors.

    What belongs to a batch (positives, ids, guides, negatives, weight, and exclude_above where it is a tensor) is given
    to ``forward``; the rest is fixed here. A temperature that is an ``nn.Parameter`` is registered and trained.
    """

    function = staticmethod(fused_infonce)
    batch = ("z1", "z2", "positives", "query_ids", "key_ids", "guides", "guide_logits", "negatives", "weight")
    numbers: ClassVar[tuple[str, ...]] = ("temperature",)
    check: ClassVar[Callable[..., None]] = staticmethod(validation.contrastive_options)

    def __init__(self, temperature: float | Tensor = 0.05, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        positives: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weight: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        options = self.drawn(self.fixed()) | more
        return type(self).function(
            z1, z2, positives=positives, query_ids=query_ids, key_ids=key_ids, weight=weight, **options
        )


class FocalInfoNCELoss(InfoNCELoss):
    """Module form of :func:`pycse.fused_focal_infonce`; see there for formula, arguments and errors.

    As :class:`InfoNCELoss`, with the hardness ``m``, which may be an ``nn.Parameter`` as well.
    """

    function = staticmethod(fused_focal_infonce)
    numbers = ("temperature", "m")

    def __init__(self, temperature: float | Tensor = 0.05, m: float | Tensor = 0.3, **options: Any) -> None:
        super().__init__(temperature, m=m, **options)


class SigmoidLoss(Loss):
    """Module form of :func:`pycse.fused_sigmoid`; see there for formula, arguments and errors.

    What belongs to a batch (positives, query_ids, key_ids, weight) is given to ``forward``; the rest is fixed here.
    ``scale`` and ``bias`` may be ``nn.Parameter``s, which are registered and trained.
    """

    function = staticmethod(fused_sigmoid)
    batch = ("z1", "z2", "positives", "query_ids", "key_ids", "weight")
    numbers = ("scale", "bias")
    check = staticmethod(validation.sigmoid_options)

    def __init__(self, scale: float | Tensor = 10.0, bias: float | Tensor = -10.0, **options: Any) -> None:
        super().__init__(scale=scale, bias=bias, **options)

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        positives: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return fused_sigmoid(
            z1, z2, positives=positives, query_ids=query_ids, key_ids=key_ids, weight=weight, **self.drawn(self.fixed())
        )


class AdapACSELoss(InfoNCELoss):
    """Module form of :func:`pycse.fused_adapacse`; see there for formula, arguments and errors.

    As :class:`InfoNCELoss`; the margin ``m`` is a number. A batch has ``guides`` or ``guide_logits``.
    """

    function = staticmethod(fused_adapacse)
    check = staticmethod(validation.adapacse_options)

    def __init__(self, temperature: float | Tensor = 0.05, m: float = 0.1, **options: Any) -> None:
        super().__init__(temperature, m=m, **options)


class DistillLoss(Loss):
    """Module form of :func:`pycse.fused_distill`; see there for formula, arguments and errors.

    Options of the loss are fixed here; what belongs to a batch (teachers, teacher_logits, seed, weight) is given to
    ``forward``.
    """

    function = staticmethod(fused_distill)
    batch = ("z", "teachers", "teacher_logits", "seed", "weight")
    check = staticmethod(validation.distillation_options)

    def forward(
        self,
        z: Tensor,
        teachers: Sequence[Tensor] | None = None,
        *,
        teacher_logits: Tensor | None = None,
        seed: int | Tensor | torch.Generator | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        options = self.drawn(self.options)
        return fused_distill(z, teachers, teacher_logits=teacher_logits, seed=seed, weight=weight, **options)


class DistillCSELoss(Loss):
    """Module form of :func:`pycse.fused_distillcse`; see there for formula, arguments and errors.

    As :class:`DistillLoss`; ``temperature`` and ``m`` may be ``nn.Parameter``s, which are registered and trained.
    """

    function = staticmethod(fused_distillcse)
    batch = (*InfoNCELoss.batch, "teachers", "teacher_logits", "seed")
    numbers = ("temperature", "m")
    check = staticmethod(validation.distillcse_options)

    def __init__(self, temperature: float | Tensor = 0.05, m: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(temperature=temperature, m=m, **options)

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        teachers: Sequence[Tensor] | None = None,
        *,
        teacher_logits: Tensor | None = None,
        seed: int | Tensor | torch.Generator | None = None,
        positives: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weight: Tensor | None = None,
        **more: Any,
    ) -> DistillCSEOutput:
        return fused_distillcse(
            z1,
            z2,
            teachers,
            teacher_logits=teacher_logits,
            seed=seed,
            positives=positives,
            query_ids=query_ids,
            key_ids=key_ids,
            weight=weight,
            **(self.drawn(self.fixed()) | more),
        )


class SupConLoss(Loss):
    """Module form of :func:`pycse.fused_supcon`; see there for formula, arguments and errors.

    What belongs to a batch (embeddings, ids, weight) is given to ``forward``. A temperature that is an ``nn.Parameter``
    is registered and trained.
    """

    function = staticmethod(fused_supcon)
    batch = ("z1", "ids1", "z2", "ids2", "weight")
    numbers = ("temperature",)
    check = staticmethod(validation.supervised_options)

    def __init__(self, temperature: float | Tensor = 0.05, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def forward(
        self,
        z1: Tensor,
        ids1: Tensor,
        z2: Tensor | None = None,
        ids2: Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        return fused_supcon(z1, ids1, z2, ids2, weight=weight, **self.drawn(self.fixed()))
