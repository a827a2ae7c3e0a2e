"""DistillCSE over columns: teachers are models that read the batch's texts, or embeddings in the label column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn

from pycse import validation
from pycse.distillation import DistillCSEOutput, fused_distillcse
from pycse.sentence_transformers import citations
from pycse.sentence_transformers.columns import Batch
from pycse.sentence_transformers.losses import InfoNCELoss

TEXTS = "texts"  # where the first column's features hold the texts of all columns
# Sentences a pass: encode sorts by length, and small batches of alike lengths save half of the time on a CPU. 64 of the
# default text through MiniLM, one thread: 2.1 s at 64, 1.0 at 16 and at 8.
ON_A_CPU = 16


class TextCollator(SentenceTransformerDataCollator):
    """sentence-transformers' collator, which also passes on the texts themselves, for teachers with tokenizers of their
    own.

        SentenceTransformerTrainer(..., data_collator=TextCollator(model.preprocess))
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(features)
        labels = {"dataset_name", *self.valid_label_columns}
        columns = [name for name in features[0] if name not in labels]
        if columns:
            batch[f"{columns[0]}_{TEXTS}"] = [[row[name] for row in features] for name in columns]
        return batch


def embed(encoder: Any, texts: Sequence[str]) -> Tensor:
    """(B, D) embeddings by a teacher, without gradient."""
    device = encoder.device.type
    size = ON_A_CPU if device == "cpu" else len(texts)
    with torch.autocast(device, enabled=False):  # they do not depend on how the student is trained
        z = encoder.encode(list(texts), batch_size=size, convert_to_tensor=True, show_progress_bar=False)
    return z.clone()  # encode makes inference tensors, which autograd cannot keep


class Teacher:
    """A frozen SentenceTransformer as a function of texts."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder.eval().requires_grad_(False)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return embed(self.encoder, texts)


class DistillCSELoss(InfoNCELoss):
    """InfoNCE, or with ``m`` Focal-InfoNCE, and the distillation of the first column's similarities from teachers.

    Args:
        model: the SentenceTransformer that is trained.
        teachers: SentenceTransformers, or functions that make (B, D_k) embeddings of a list of texts. They are not
            trained, nor saved with the model, and need ``data_collator=TextCollator(model.preprocess)``. None: the
            dataset's label column holds their embeddings of the first column, side by side.
        teacher_widths: the widths D_k of embeddings side by side; by default one teacher has all of it.
        temperature, m: of the contrastive part; ``m=None`` is InfoNCE. Numbers or ``nn.Parameter``s.
        seed: of the shuffle, which draws from a generator of its own; None draws from torch's.
        distill_weight, teacher_weights, student_temperature, teacher_temperature, group_temperature, group_p,
            group_size, span, shuffle, divergence: as :func:`pycse.fused_distillcse`.
        options: of :class:`InfoNCELoss` but directions and partition_mode.

    ``latest`` holds the last batch's (loss, contrastive, distillation), detached, for logging.

    Source: Xu et al., Findings of EMNLP 2023 (arXiv 2310.13499).
    """

    numbers = ("temperature", "m")
    more_options = tuple(name for name in InfoNCELoss.more_options if name != "exchange")  # teachers are gathered
    OF_DISTILLATION = (
        "distill_weight", "teacher_weights", "student_temperature", "teacher_temperature", "group_temperature",
        "group_p", "group_size", "span", "shuffle", "divergence",
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        teachers: Sequence[Any] | None = None,
        temperature: float | Tensor = 0.05,
        m: float | Tensor | None = None,
        *,
        teacher_widths: Sequence[int] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        for name in ("directions", "partition_mode"):
            if name in options:
                raise TypeError(f"option {name!r} is one of InfoNCELoss, which DistillCSELoss does not take")
        distillation = {name: options.pop(name) for name in self.OF_DISTILLATION if name in options}
        super().__init__(model, temperature, **options)
        if m is not None:
            validation.real("m", m)
        del self.options["directions"], self.options["partition"]
        if teachers is not None and teacher_widths is not None:
            raise ValueError("teachers and teacher_widths exclude each other (embeddings are made, or given)")
        if teachers is not None and len(teachers) == 0:
            raise ValueError("teachers must hold at least one teacher, got an empty list")
        for k, teacher in enumerate(teachers or ()):
            if teacher is model:
                raise ValueError(f"teachers[{k}] is the model that is trained; give a copy of it, or another one")
            if not isinstance(teacher, nn.Module) and not callable(teacher):
                raise TypeError(f"teachers[{k}] must be a SentenceTransformer or a function of texts, got {teacher!r}")
        if teacher_widths is not None and not isinstance(teacher_widths, (list, tuple)):
            raise TypeError(f"teacher_widths must be a sequence of widths, got {teacher_widths!r}")
        for width in teacher_widths or ():
            validation.whole("teacher_widths", width)
            if width < 1:
                raise ValueError(f"teacher_widths must be at least 1 each, got {width}")
        validation.distillation_options(**distillation)
        if seed is not None:
            validation.whole("seed", seed)
        self.m, self.distillation = m, distillation
        self.teacher_widths = None if teacher_widths is None else tuple(teacher_widths)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.latest: DistillCSEOutput | None = None
        self._texts: Any = None  # of the latest batch, and its teachers' embeddings
        self._made: list[Tensor] = []
        self._width = 0
        # In a tuple: no children of this module, so neither trained nor saved.
        self._teachers: tuple[Callable[..., Tensor], ...] | None = (
            None if teachers is None else tuple(Teacher(t) if isinstance(t, nn.Module) else t for t in teachers)
        )

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        z1, *others = embeddings
        query_ids, key_ids = batch.ids or (None, None)
        generator = self.generator
        if (
            generator is not None and not torch.is_grad_enabled()
        ):  # an evaluation draws, and leaves the training's as is
            generator = torch.Generator().set_state(generator.get_state())
        self.latest = fused_distillcse(
            z1, torch.cat(others) if len(others) > 1 else others[0], self.embedded(batch, z1),
            query_ids=query_ids, key_ids=key_ids, seed=generator, group=self.group, **self.drawn(self.fixed()),
            **self.distillation,
        )  # fmt: skip
        loss = self.latest.loss
        self.latest = DistillCSEOutput(*(x.detach() for x in self.latest))
        return loss

    def embedded(self, batch: Batch, z: Tensor) -> list[Tensor]:
        """The teachers' embeddings of the first column."""
        if self._teachers is not None:
            texts = (batch.columns or [{}])[0].get(TEXTS)
            if texts is None:
                raise ValueError(
                    "teachers read texts, which the trainer's collator does not pass on: give the trainer "
                    "data_collator=TextCollator(model.preprocess)"
                )
            if self._texts is not texts:  # else the batch comes again: MatryoshkaLoss
                self._texts, self._made = texts, [teacher(texts[0]).to(z.device) for teacher in self._teachers]
            return self._made
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.dim() != 2 or not labels.dtype.is_floating_point:
            raise ValueError(
                "DistillCSELoss without teachers needs a label column with their embeddings of the first column, a "
                f"list of numbers a row, got {getattr(labels, 'shape', labels)}"
            )
        self._width = self._width or labels.shape[1]
        if labels.shape[1] != self._width:
            raise ValueError(
                f"the labels' width changed from {self._width} to {labels.shape[1]}: MatryoshkaLoss cuts labels that "
                "are as wide as the model's embeddings. Put it around CachedDistillCSELoss, or give teachers"
            )
        widths = self.teacher_widths or (labels.shape[1],)
        if sum(widths) != labels.shape[1]:
            raise ValueError(f"teacher_widths {widths} must add up to the {labels.shape[1]} numbers of a label")
        return [part.to(z.device) for part in labels.split(list(widths), 1)]

    def get_config_dict(self) -> dict[str, Any]:
        temperature = self.temperature.tolist() if isinstance(self.temperature, Tensor) else self.temperature
        numbers = {"temperature": temperature, "m": None if self.m is None else float(self.m)}
        options = {name: value for name, value in self.options.items() if name != "normalize"}
        options["hardness_strength"] = options.pop("hardness")
        options["hardness_mode"] = options["hardness_mode"] if options["hardness_strength"] else None
        own = {"similarity_fct": self.similarity_fct, **self.own_options()}
        teachers = None if self._teachers is None else [str(getattr(t, "encoder", t)) for t in self._teachers]
        return {
            **numbers,
            **options,
            **self.described(),
            **self.distillation,
            **own,
            "teachers": teachers,
            "teacher_widths": self.teacher_widths,
        }

    @property
    def citation(self) -> str:
        return citations.DISTILLCSE
