"""The sigmoid loss of all pairs. It validates its arguments and calls one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pycse import matryoshka, ops, validation
from pycse.functional import as_long, number_or_tensor
from pycse.matryoshka import MatryoshkaOutput
from pycse.problem import Sigmoid
from pycse.transforms import recordable


@recordable
def fused_sigmoid(
    z1: Tensor,
    z2: Tensor,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    *,
    positives: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    parts: bool = False,
    group: Any = None,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor | MatryoshkaOutput:
    r"""The sigmoid loss (SigLIP): every pair of a row and a key is classified by itself, without an N x N matrix.

    .. code-block:: text

        s_ij = <z1_i, z2_j> / (|z1_i| |z2_j|)
        x_ij = scale s_ij + bias
        L_i  = sum_j log(1 + exp(-y_ij x_ij)),    y_ij = 1 where key j is a positive of row i, else -1
        loss = mean_i L_i                         the sum over all pairs by the number of rows

    No softmax: a row may have any number of positives, also none, and its loss is a sum over keys.

    Args:
        z1: (B, D) embeddings of the queries; float32, float64, bfloat16 or float16, any scale. A row with norm
            <= 1e-12 counts as 0 and gets gradient 0; an infinite number or NaN makes the loss NaN.
        z2: (N, D) embeddings of the keys, same dtype and device. Keys beyond B are negatives.
        scale: > 0, no unit: 1 / temperature. A number or a 0-d float tensor, which may require grad. Where rows are
            normalised scale + \|bias\| may be 1e6 at most (1e12 for float64): cosines resolve no larger logits. The
            paper trains log(scale), from scale = 10.
        bias: added to every logit; its start at -10 makes up for the many negatives. A number or a 0-d float tensor,
            which may require grad.
        positives: (B,) integers: row i's positive is key ``positives[i]``; by default key i, then N >= B.
        query_ids, key_ids: (B,) and (N,) integers, instead of ``positives``: all keys with the row's id are its
            positives. With ids N may be anything.
        normalize: False where rows have unit norm already; dot products outside [-1, 1] stay correct.
        weight: (B,) floats, may require grad; "mean" is then sum(w L) / sum(w).
        reduction: "mean", "sum" or "none" (the B row losses, times their weights).
        dims, dim_weights, parts: the loss at several lengths of the embeddings, as in :func:`pycse.fused_infonce`; each
            is computed by itself.
        group: None, or the processes that share the batch, as in :func:`pycse.fused_focal_infonce`.
        backend: "auto", "reference", "torch", "cpu" or "triton"; see ``pycse.info()``. A named backend never falls
            back. "cuda" has no kernels of it.
        validate: also check tensor values (positives, scale, bias) on a GPU, which waits for it. On a CPU they are
            always checked. Unchecked, a bad value gives NaN in its rows.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or (B,) for "none". Gradients have the inputs' dtype. Under
        ``torch.no_grad()`` no gradients are computed.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: Zhai, Mustafa, Kolesnikov & Beyer, "Sigmoid Loss for Language Image Pre-Training", ICCV 2023
    (arXiv 2303.15343), algorithm 1.
    """
    given: dict[str, Any] = dict(
        positives=positives, query_ids=query_ids, key_ids=key_ids, normalize=normalize, weight=weight,
        reduction=reduction, backend=backend, validate=validate,
    )  # fmt: skip
    if matryoshka.wanted(z1, dims, dim_weights, parts, group):
        one = lambda z1, z2, _: fused_sigmoid(z1, z2, scale, bias, group=group, **given)  # noqa: E731
        return matryoshka.summed("fused_sigmoid", one, z1, z2, None, dims, dim_weights, parts, group)
    if group is not None:
        from pycse import distributed

        batch = dict(z1=z1, z2=z2, positives=positives, query_ids=query_ids, key_ids=key_ids, weight=weight)
        make = lambda **more: problem_of(scale=scale, bias=bias, **{**given, **more})  # noqa: E731
        return distributed.sigmoid("fused_sigmoid", make, batch, group=group, backend=backend, validate=validate)
    return ops.sigmoid(problem_of(z1, z2, scale, bias, **given), backend, validate)


def problem_of(
    z1: Any,
    z2: Any,
    scale: Any,
    bias: Any,
    *,
    positives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    normalize: bool,
    weight: Tensor | None,
    reduction: str,
    **others: Any,
) -> Sigmoid:
    """The problem that the public function's arguments state, once they are checked."""
    validation.sigmoid(
        z1, z2, scale, bias,
        positives=positives, query_ids=query_ids, key_ids=key_ids, normalize=normalize, weight=weight,
        reduction=reduction, **others,
    )  # fmt: skip
    return Sigmoid(
        z1, z2, number_or_tensor(scale), number_or_tensor(bias), weight,
        positives=as_long(positives), query_ids=as_long(query_ids), key_ids=as_long(key_ids), normalize=normalize,
        reduction=reduction,
    )  # fmt: skip
