"""AdapACSE: InfoNCE with angular margins of a teacher. It validates its arguments and calls one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pycse import matryoshka, ops, validation
from pycse.functional import as_long, number_or_tensor, side_by_side
from pycse.matryoshka import MatryoshkaOutput
from pycse.problem import Angular
from pycse.transforms import recordable


@recordable
def fused_adapacse(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.05,
    m: float = 0.1,
    *,
    guides: Sequence[tuple[Tensor, Tensor]] | None = None,
    guide_weights: Sequence[float] | None = None,
    guide_logits: Tensor | None = None,
    positives: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    parts: bool = False,
    group: Any = None,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor | MatryoshkaOutput:
    r"""AdapACSE (KDMCSE): InfoNCE with an angular margin that a teacher adapts to each negative; no N x N matrix.

    .. code-block:: text

        s_ij = cos(theta_ij) = <z1_i, z2_j> / (|z1_i| |z2_j|)
        phi_ij = m (1 - alpha_ij)                             alpha_ij: the guides' averaged cosine, within [-1, 1]
        l_ii = s_ii / temperature                             the positive
        l_ij = cos(theta_ij - phi_ij) / temperature           negatives with theta_ij > m; others: s_ij / temperature
        L_i  = logsumexp_j l_ij - l_ii,    loss = mean_i L_i

    The less alike a guide finds a row and a key, the more the key is turned towards its row, and the further the loss
    pushes it away. m = 0 is InfoNCE. Rows are always normalised: an angle is one of unit rows.

    The slope of l over s is (cos(phi) - s sin(phi) / sin(theta)) / temperature, which has no bound for opposite rows
    (s = -1). A sin(theta) below 2^-10 counts as 2^-10 there, and there alone: no slope is larger than
    (1 + 1024 sin(phi)) / temperature, and values are exact. At theta = m the value jumps, as published: a pair within
    rounding of it may be on either side.

    Args:
        z1: (B, D) embeddings of the queries; float32, float64, bfloat16 or float16, any scale. A row with norm
            <= 1e-12 counts as 0 and gets gradient 0; an infinite number or NaN makes the loss NaN.
        z2: (N, D) embeddings of the keys, same dtype and device. Keys beyond B are negatives.
        temperature: > 0, no unit; at least 1e-6 (1e-12 for float64): cosines resolve no larger logits. A number or a
            0-d float tensor, which may require grad.
        m: the margin in radians, 0 to pi/2; a number.
        guides: [(gq, gk), ...]: embeddings of the same rows (B, D_k) and keys (N, D_k) by other models, any width, no
            gradient. Their averaged cosines are alpha. These or guide_logits have to be given.
        guide_weights: one number >= 0 a guide, normalised to sum 1; default: equal.
        guide_logits: instead of ``guides``, (B, N) averaged cosines made elsewhere.
        positives: (B,) integers: row i's positive is key ``positives[i]``; by default key i, then N >= B.
        query_ids, key_ids: (B,) and (N,) integers. A key with the row's id that is not its positive is no negative.
        weight: (B,) floats, may require grad; "mean" is then sum(w L) / sum(w).
        reduction: "mean", "sum" or "none" (the B row losses, times their weights).
        dims, dim_weights, parts: the loss at several lengths of the embeddings, as in :func:`pycse.fused_infonce`; each
            is computed by itself.
        group: None, or the processes that share the batch, as in :func:`pycse.fused_focal_infonce`.
        backend: "auto", "reference", "torch", "cpu" or "triton"; see ``pycse.info()``. A named backend never falls
            back. "cuda" has no kernels of it.
        validate: also check tensor values (positives, temperature) on a GPU, which waits for it. On a CPU they are
            always checked. Unchecked, a bad value gives NaN in its rows.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or (B,) for "none". A row left with its positive only has
        loss 0. Gradients have the inputs' dtype. Under ``torch.no_grad()`` no gradients are computed.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: Nguyen et al., "KDMCSE: Knowledge Distillation Multimodal Sentence Embeddings with Adaptive Angular margin
    Contrastive Learning", NAACL 2024 (arXiv 2403.17486).
    """
    batch: dict[str, Any] = dict(
        z1=z1, z2=z2, guides=guides, guide_weights=guide_weights, guide_logits=guide_logits, positives=positives,
        query_ids=query_ids, key_ids=key_ids, weight=weight,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        temperature=temperature, m=m, reduction=reduction, backend=backend, validate=validate
    )  # fmt: skip
    if matryoshka.wanted(z1, dims, dim_weights, parts, group):
        others = {**batch, **options, "group": group}
        one = lambda z1, z2, t: fused_adapacse(**{**others, "z1": z1, "z2": z2, "temperature": t})  # noqa: E731
        return matryoshka.summed("fused_adapacse", one, z1, z2, temperature, dims, dim_weights, parts, group)
    if group is not None:
        from pycse import distributed

        make = lambda **batch: problem_of(**batch, **options)  # noqa: E731
        return distributed.adapacse(
            "fused_adapacse", make, batch, group=group, backend=backend, validate=validate
        )  # fmt: skip
    return ops.adapacse(problem_of(**batch, **options), backend, validate)


def problem_of(
    z1: Any,
    z2: Any,
    temperature: Any,
    m: Any,
    *,
    guides: Any,
    guide_weights: Any,
    guide_logits: Tensor | None,
    positives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    **others: Any,
) -> Angular:
    """The problem that the public function's arguments state, once they are checked."""
    validation.adapacse(
        z1, z2, temperature, m,
        guides=guides, guide_weights=guide_weights, guide_logits=guide_logits, positives=positives,
        query_ids=query_ids, key_ids=key_ids, weight=weight, reduction=reduction, **others,
    )  # fmt: skip
    queries, keys = (None, None) if guides is None else side_by_side(guides, guide_weights)
    return Angular(
        z1, z2, number_or_tensor(temperature), weight,
        positives=as_long(positives), query_ids=as_long(query_ids), key_ids=as_long(key_ids),
        guide_queries=queries, guide_keys=keys, guide_logits=guide_logits, m=float(m), reduction=reduction,
    )  # fmt: skip
