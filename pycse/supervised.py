"""The supervised contrastive loss: validates its arguments and calls one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pycse import matryoshka, ops, validation
from pycse.functional import as_long, number_or_tensor
from pycse.matryoshka import MatryoshkaOutput
from pycse.problem import Supervised
from pycse.transforms import recordable


@recordable
def fused_supcon(
    z1: Tensor,
    ids1: Tensor,
    z2: Tensor | None = None,
    ids2: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    *,
    inside: bool = False,
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
    r"""Supervised contrastive loss: every key with the row's id is a positive; without an N x N matrix.

    .. code-block:: text

        s_ij = <z1_i, z2_j> / (|z1_i| |z2_j|),    e_ij = exp(s_ij / temperature)
        P(i) = the keys j with ids2_j = ids1_i,   n_i their number
        L_i  = -1/n_i sum_{p in P(i)} log(e_ip / sum_j e_ij)         L_out, the paper's
        L_i  = -log( sum_{p in P(i)} e_ip / (n_i sum_j e_ij) )       L_in, with inside=True
        loss = mean_i L_i

    Without z2 the keys are the other rows of z1: row i is neither a positive nor in the sum over j.

    Args:
        z1: (B, D) embeddings of the rows; float32, float64, bfloat16 or float16, any scale. A row with norm <= 1e-12
            counts as 0 and gets gradient 0; an infinite number or NaN makes the loss NaN.
        ids1: (B,) integers, any: the rows' classes. Rows may have different numbers of positives; one without any has
            loss 0 and no gradient, and counts in the mean.
        z2: (N, D) embeddings of the keys, same dtype and device; None: those of z1 without the row itself.
        ids2: (N,) integers, given together with z2: the keys' classes.
        temperature: > 0, no unit. A number or a 0-d float tensor, which may require grad. Where rows are normalised it
            may be 1e-6 at least (1e-12 for float64): cosines resolve no sharper logits.
        inside: the mean over the positives inside the logarithm: a row is then content with its nearest positives.
        normalize: False where rows have unit norm already; dot products outside [-1, 1] stay correct.
        weight: (B,) floats, may require grad; "mean" is then sum(w L) / sum(w).
        reduction: "mean", "sum" or "none" (the B row losses, times their weights).
        dims, dim_weights, parts: the loss at several lengths of the embeddings, as in :func:`pycse.fused_infonce`; each
            is computed by itself.
        group: None, or the processes that share the batch, as in :func:`pycse.fused_focal_infonce`.
        backend: as in :func:`pycse.fused_focal_infonce`; "cuda" has no kernels for this loss yet.
        validate: also check the temperature's value on a GPU, which waits for it. On a CPU it is always checked.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or (B,) for "none". Gradients have the inputs' dtype.
        Beside gradients and inputs O(c N) memory; 6 B N D operations.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020 (arXiv 2004.11362), eq. 2 and 3. Its loss is
    the sum over rows of two views; here they are rows of z1.
    """
    given: dict[str, Any] = dict(
        inside=inside, normalize=normalize, weight=weight, reduction=reduction, backend=backend, validate=validate,
    )  # fmt: skip
    if matryoshka.wanted(z1, dims, dim_weights, parts, group):
        one = lambda z1, z2, temperature: fused_supcon(z1, ids1, z2, ids2, temperature, group=group, **given)  # noqa: E731
        return matryoshka.summed("fused_supcon", one, z1, z2, temperature, dims, dim_weights, parts, group)
    if group is not None:
        from pycse import distributed

        batch = dict(z1=z1, ids1=ids1, z2=z2, ids2=ids2, weight=weight)
        make = lambda **more: problem_of(temperature=temperature, **{**given, **more})  # noqa: E731
        return distributed.supervised("fused_supcon", make, batch, group=group, backend=backend, validate=validate)
    return ops.supervised(problem_of(z1, ids1, z2, ids2, temperature, **given), backend, validate)


def problem_of(
    z1: Any,
    ids1: Any,
    z2: Any,
    ids2: Any,
    temperature: Any,
    *,
    inside: bool,
    normalize: bool,
    weight: Tensor | None,
    reduction: str,
    **others: Any,
) -> Supervised:
    """The problem that the public function's arguments state, once they are checked."""
    validation.supervised(
        z1,
        ids1,
        z2,
        ids2,
        temperature,
        inside=inside,
        normalize=normalize,
        weight=weight,
        reduction=reduction,
        **others,
    )
    rows = as_long(ids1)
    assert rows is not None  # checked
    return Supervised(
        z1,
        z2,
        number_or_tensor(temperature),
        weight,
        rows,
        as_long(ids2),
        inside=inside,
        normalize=normalize,
        reduction=reduction,
    )
