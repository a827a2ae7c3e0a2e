"""Contrastive losses over the columns of a dataset. Formulas and options are those of pycse's functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pycse import validation
from pycse.choices import EXCLUDE_BY
from pycse.functional import fused_focal_infonce, fused_infonce
from pycse.matryoshka import Drawn
from pycse.sentence_transformers import citations
from pycse.sentence_transformers.columns import Batch, ColumnLoss
from pycse.supervised import fused_supcon
from pycse.validation import choice, number

# sentence-transformers' words for directions, and ours.
DIRECTIONS = {"query_to_doc": "qd", "query_to_query": "qq", "doc_to_query": "dq", "doc_to_doc": "dd"}
SIMILARITIES = {"cos_sim": True, "dot_score": False}  # whether rows are normalised


def similarity_name(similarity_fct: Any) -> str:
    name = similarity_fct if isinstance(similarity_fct, str) else getattr(similarity_fct, "__name__", "")
    if name not in SIMILARITIES:
        raise ValueError(f"similarity_fct must be cos_sim or dot_score, got {similarity_fct!r}")
    return name


class InfoNCELoss(Drawn, ColumnLoss):
    r"""InfoNCE over columns: what MultipleNegativesRankingLoss computes, with scale = 1 / temperature, without B x N
    matrices.

    .. code-block:: text

        L_i = log sum_j exp(s_ij / temperature) - s_i,pos / temperature

    Columns: anchor; anchor, positive; or these and negatives, of which those of its own row are row i's hard
    negatives. One column is embedded twice (:class:`ColumnLoss`).

    Args:
        model: the SentenceTransformer that is trained.
        temperature: > 0. A number, or an ``nn.Parameter``, which is trained; the trainer clips the model's gradients
            alone, not its.
        similarity_fct: ``cos_sim`` (default) or ``dot_score`` of sentence_transformers.util, or their names.
        directions, partition_mode, hardness_mode, hardness_strength: as MultipleNegativesRankingLoss.
        deduplicate, precision, gather_across_devices, group: :class:`ColumnLoss`.
        options: other options of :func:`pycse.fused_infonce`: positive_margin, hard_negative_weight, exclude_above (a
            number), exclude_by, symmetric, reduction ("mean" or "sum"), backend, validate, exchange, dims and
            dim_weights (:class:`MatryoshkaInfoNCELoss`).

    Raises:
        TypeError, ValueError: a wrong option, here; a batch that cannot be used, at the first one.

    Source: Gao, Yao & Chen, "SimCSE", EMNLP 2021 (arXiv 2104.08821); Henderson et al. (arXiv 1705.00652).
    """

    function: ClassVar[Callable[..., Any]] = staticmethod(fused_infonce)
    numbers: ClassVar[tuple[str, ...]] = ("temperature",)
    more_options: ClassVar[tuple[str, ...]] = (
        "positive_margin", "hard_negative_weight", "exclude_above", "exclude_by", "symmetric", "reduction", "backend",
        "validate", "exchange", "dims", "dim_weights", "n_dims_per_step",
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        temperature: float | Tensor | Sequence[float] = 0.05,
        *,
        similarity_fct: Any = "cos_sim",
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        deduplicate: bool = True,
        precision: str | None = None,
        gather_across_devices: bool = True,
        group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, deduplicate, precision, gather_across_devices, group)
        for name in options:
            if name not in self.more_options:
                raise TypeError(f"option {name!r} is none of {type(self).__name__}: {', '.join(self.more_options)}")
        if isinstance(directions, str):
            raise TypeError(f"directions must be a sequence of names, got {directions!r}")
        for name in directions:
            choice("directions", name, (*DIRECTIONS, *DIRECTIONS.values()))
        number("hardness_strength", hardness_strength)
        if hardness_strength < 0:
            raise ValueError(f"hardness_strength must be >= 0, got {hardness_strength!r}")
        if options.get("symmetric") and len(directions) > 1:
            raise ValueError("symmetric and directions exclude each other; give one of them")
        if isinstance(options.get("exclude_above"), Tensor):
            raise TypeError("exclude_above must be a number here: a tensor belongs to one batch")
        self.similarity_fct = similarity_name(similarity_fct)
        self.options = {
            "directions": tuple(DIRECTIONS.get(name, name) for name in directions),
            "partition": partition_mode,
            "hardness": float(hardness_strength) if hardness_mode else 0.0,
            "hardness_mode": hardness_mode or "all_negatives",
            "normalize": SIMILARITIES[self.similarity_fct],
            **options,
        }
        checked = self.check_lengths(self.options | {"temperature": temperature})
        self.options.pop("n_dims_per_step", None)
        check_width(model, self.options.get("dims"))
        validation.contrastive_options(**{name: value for name, value in checked.items() if name != "exchange"})
        if self.options.get("reduction", "mean") == "none":
            raise ValueError("reduction must be 'mean' or 'sum': a trainer needs one number, got 'none'")
        self.temperature = temperature

    def fixed(self) -> dict[str, Any]:
        return {name: self.number(name) for name in self.numbers} | self.options

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        z1, *others = embeddings
        if not others:
            raise ValueError(f"{type(self).__name__} compares at least two columns of embeddings, got 1")
        query_ids, key_ids = batch.ids or (None, None)
        options = self.drawn(self.fixed())
        if len(others) == 1:
            if options["hardness_mode"] == "hard_negatives":  # there are none
                options["hardness"] = 0.0
            both_ways = sorted(options["directions"]) == ["dq", "qd"] and options["partition"] == "per_direction"
            if both_ways and not options["hardness"]:  # a pair's ids are equal: rows and columns of one matrix
                options |= {"directions": ("qd",), "symmetric": True}
        return type(self).function(
            z1, torch.cat(others) if len(others) > 1 else others[0],
            query_ids=query_ids, key_ids=key_ids, group=self.group, **options, **self.more(batch),
        )  # fmt: skip

    def more(self, batch: Batch) -> dict[str, Any]:
        """What else a batch has for the function."""
        return {}

    def get_config_dict(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            name: value.tolist() if isinstance(value, Tensor) else value for name, value in self.fixed().items()
        }
        words = {short: long for long, short in DIRECTIONS.items()}
        given["directions"] = [words[name] for name in given["directions"]]
        given["hardness_strength"] = given.pop("hardness")
        given["partition_mode"] = given.pop("partition")
        given["hardness_mode"] = given["hardness_mode"] if given["hardness_strength"] else None
        del given["normalize"]
        return given | self.described() | {"similarity_fct": self.similarity_fct} | self.own_options()

    @property
    def citation(self) -> str:
        return citations.SIMCSE


class MatryoshkaInfoNCELoss(InfoNCELoss):
    r"""InfoNCE at several lengths of the embeddings: what MatryoshkaLoss around MultipleNegativesRankingLoss computes,
    from the products of one loss.

    Args:
        model: the SentenceTransformer that is trained; ``truncate_dim`` cuts its embeddings when it is used.
        dims: the lengths, each at most the model's embeddings.
        temperature: of all lengths, or one a length.
        dim_weights: of the lengths' losses in their sum; default: 1 each.
        n_dims_per_step: how many lengths a step takes, drawn anew each time, on all processes alike; None: all.
        options: :class:`InfoNCELoss`. Its other losses, the cached ones as well, take dims, dim_weights and
            n_dims_per_step as options.

    Source: Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022 (arXiv 2205.13147).
    """

    def __init__(
        self,
        model: nn.Module,
        dims: Sequence[int],
        temperature: float | Tensor | Sequence[float] = 0.05,
        *,
        dim_weights: Sequence[float] | None = None,
        n_dims_per_step: int | None = None,
        **options: Any,
    ) -> None:
        if dims is None:
            raise TypeError("dims must be a list of lengths, got None")
        super().__init__(
            model, temperature, dims=dims, dim_weights=dim_weights, n_dims_per_step=n_dims_per_step, **options
        )

    @property
    def citation(self) -> str:
        return citations.MATRYOSHKA


def check_width(model: Any, dims: Sequence[int] | None) -> None:
    """That the model's embeddings have these lengths; where it does not say, the first batch does."""
    ask = getattr(model, "get_embedding_dimension", None) or getattr(model, "get_sentence_embedding_dimension", None)
    width = None if ask is None or dims is None else ask()
    if dims is not None and width is not None and max(dims) > width:
        raise ValueError(f"dims must lie in [1, {width}] (the model's embeddings), got {max(dims)}")


class FocalInfoNCELoss(InfoNCELoss):
    r"""Focal-InfoNCE over columns: l_pos = s^2 / temperature, negatives s (s + m) / temperature.

    As :class:`InfoNCELoss`, with the hardness ``m``, a number or an ``nn.Parameter``.

    Source: Hou & Li, Findings of EMNLP 2023 (arXiv 2310.06918).
    """

    function = staticmethod(fused_focal_infonce)
    numbers = ("temperature", "m")

    def __init__(
        self, model: nn.Module, temperature: float | Tensor = 0.05, m: float | Tensor = 0.3, **options: Any
    ) -> None:
        validation.real("m", m)
        super().__init__(model, temperature, **options)
        self.m = m

    @property
    def citation(self) -> str:
        return citations.FOCAL


class GuidedInfoNCELoss(InfoNCELoss):
    """InfoNCE without the negatives that a guide finds nearer to the anchor than its positive (GISTEmbed's
    anchor-positive part).

    Args:
        model: the SentenceTransformer that is trained.
        guide: another one, which is not trained, nor saved with the model. It reads the model's tokens where both have
            one vocabulary, else their texts again.
        margin, margin_strategy: a key is no negative above t_pos - margin ("absolute") or t_pos - margin |t_pos|
            ("relative") in the guide's cosines, as GISTEmbedLoss; or above -margin ("constant").
        temperature and others: :class:`InfoNCELoss`; GISTEmbedLoss has temperature 0.01.

    Source: Solatorio, "GISTEmbed" (arXiv 2402.16829).
    """

    def __init__(
        self,
        model: nn.Module,
        guide: Any,
        temperature: float | Tensor = 0.05,
        *,
        margin: float = 0.0,
        margin_strategy: str = "absolute",
        **options: Any,
    ) -> None:
        if guide is model:
            raise ValueError("guide must be another model than the one that is trained")
        validation.number("margin", margin)
        choice("margin_strategy", margin_strategy, EXCLUDE_BY)
        if options.get("symmetric") or len(options.get("directions", ())) > 1:
            raise ValueError("a guide speaks of anchors and positives alone: symmetric and directions exclude it")
        super().__init__(model, temperature, **options)
        self.options |= {"guide_above": -float(margin), "guide_by": margin_strategy}
        self._guide = (Guide(model, guide),)  # in a tuple: no child of this module, so neither trained nor saved

    def more(self, batch: Batch) -> dict[str, Any]:
        if batch.columns is None:
            raise ValueError("GuidedInfoNCELoss needs the columns' tokens: call forward, not embeddings alone")
        first, *others = (self._guide[0](column) for column in batch.columns)
        return {"guides": [(first, torch.cat(others))]}

    def get_config_dict(self) -> dict[str, Any]:
        given = super().get_config_dict()
        margin = -given.pop("guide_above")
        return given | {
            "guide": str(self._guide[0].encoder),
            "margin": margin,
            "margin_strategy": given.pop("guide_by"),
        }

    @property
    def citation(self) -> str:
        return citations.GIST


KEPT = 8  # columns of a batch
# What a model makes of texts, before it has run.
TOKENS = (
    "input_ids", "attention_mask", "token_type_ids", "offsets", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k",
    "max_length_q", "max_length_k", "seq_idx",
)  # fmt: skip


class Guide:
    """A frozen encoder that reads the columns of another's batch."""

    def __init__(self, model: Any, encoder: Any) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = getattr(model, "tokenizer", None)
        self.latest: list[tuple[Tensor, Tensor]] = []
        own = getattr(encoder, "tokenizer", None)
        vocabulary: tuple[dict, dict] = getattr(self.tokenizer, "get_vocab", dict)(), getattr(own, "get_vocab", dict)()
        longest = (
            getattr(model, "max_seq_length", None) or math.inf,
            getattr(encoder, "max_seq_length", None) or math.inf,
        )
        self.same_tokens = bool(vocabulary[0]) and vocabulary[0] == vocabulary[1] and longest[1] >= longest[0]
        if not self.same_tokens and not hasattr(self.tokenizer, "batch_decode"):
            raise ValueError("the model's tokenizer must have batch_decode, since its guide has another vocabulary")

    def __call__(self, column: dict[str, Any]) -> Tensor:
        """Embeddings of the column's rows; of a batch that comes again (MatryoshkaLoss) those made before."""
        for ids, made in self.latest:
            if ids is column["input_ids"]:
                return made
        if len(self.latest) >= KEPT:
            self.latest.clear()
        self.latest.append((column["input_ids"], self.embedded(column)))
        return self.latest[-1][1]

    @torch.no_grad()
    def embedded(self, column: dict[str, Any]) -> Tensor:
        device = column["input_ids"].device
        if self.encoder.device != device:
            self.encoder.to(device)
        if self.same_tokens:
            features = {name: column[name] for name in TOKENS if name in column}
        else:
            assert self.tokenizer is not None
            ids = column["input_ids"]
            if (bounds := column.get("cu_seq_lens_q")) is not None:  # texts behind one another
                ids = [part.tolist() for part in ids.flatten().tensor_split(bounds[1:-1].cpu())]
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            features = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.encoder.preprocess(texts).items()
            }
        return self.encoder(features)["sentence_embedding"].detach()


class SupConLoss(Drawn, ColumnLoss):
    """The supervised contrastive loss: every text of the batch with the row's label is a positive.

    All columns of a row have its label; texts of all of them are compared with each other. Options are those of
    :func:`pycse.fused_supcon`: temperature, inside, backend, validate, reduction ("mean" or "sum"), dims and
    dim_weights; and n_dims_per_step, as :class:`MatryoshkaInfoNCELoss`.

    Source: Khosla et al., NeurIPS 2020 (arXiv 2004.11362).
    """

    wants_positives = False
    more_options: ClassVar[tuple[str, ...]] = (
        "inside", "backend", "validate", "reduction", "dims", "dim_weights", "n_dims_per_step",
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        temperature: float | Tensor | Sequence[float] = 0.05,
        *,
        similarity_fct: Any = "cos_sim",
        precision: str | None = None,
        gather_across_devices: bool = True,
        group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, False, precision, gather_across_devices, group)
        self.similarity_fct = similarity_name(similarity_fct)
        for name in options:
            if name not in self.more_options:
                raise TypeError(f"option {name!r} is none of {type(self).__name__}: {', '.join(self.more_options)}")
        self.options = {"normalize": SIMILARITIES[self.similarity_fct], **options}
        checked = self.check_lengths(self.options | {"temperature": temperature})
        self.options.pop("n_dims_per_step", None)
        check_width(model, self.options.get("dims"))
        validation.supervised_options(**checked)
        if self.options.get("reduction", "mean") == "none":
            raise ValueError("reduction must be 'mean' or 'sum': a trainer needs one number, got 'none'")
        self.temperature = temperature

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        if not isinstance(batch.labels, Tensor) or batch.labels.dtype.is_floating_point:
            raise TypeError(
                f"SupConLoss needs a dataset with a label column of integers (the rows' classes), got {batch.labels!r}"
            )
        if batch.labels.numel() != len(embeddings[0]):
            raise ValueError(
                f"labels must be one class a row, {len(embeddings[0])} of them, got shape {tuple(batch.labels.shape)}"
            )
        z, ids = torch.cat(embeddings), batch.labels.flatten().repeat(len(embeddings))
        return fused_supcon(
            z, ids.to(z.device), temperature=self.number("temperature"), group=self.group, **self.drawn(self.options)
        )

    def get_config_dict(self) -> dict[str, Any]:
        options = {name: value for name, value in self.options.items() if name != "normalize"}
        own = self.own_options()
        del own["deduplicate"]
        temperature = self.temperature.tolist() if isinstance(self.temperature, Tensor) else self.temperature
        return {
            "temperature": temperature, **options, **self.described(), "similarity_fct": self.similarity_fct, **own,
        }  # fmt: skip

    @property
    def citation(self) -> str:
        return citations.SUPCON
