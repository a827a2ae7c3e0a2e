"""The contrastive losses. Each validates its arguments and calls one operator. (Distillation:
pycse/distillation.py.)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycse import backends, ops, validation
from pycse.problem import Contrastive
from pycse.transforms import recordable


@recordable
def fused_focal_infonce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.05,
    m: float | Tensor = 0.3,
    *,
    positives: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_above: float | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    r"""Focal-InfoNCE: SimCSE's contrastive loss with self-paced weights on hard negatives, without an N x N matrix.

    .. code-block:: text

        s_ij = <z1_i, z2_j> / (|z1_i| |z2_j|)
        l_ii = s_ii^2 / temperature                   the positive: easy positives weigh more
        l_ij = s_ij (s_ij + m) / temperature          negatives: hard ones weigh more
        L_i  = logsumexp_j l_ij - l_ii,    loss = mean_i L_i

    Args:
        z1: (B, D) embeddings of the queries; float32, float64, bfloat16 or float16, any scale. A row with norm
            <= 1e-12 counts as 0 and gets gradient 0; an infinite number or NaN makes the loss NaN.
        z2: (N, D) embeddings of the keys, same dtype and device. Keys beyond B are extra or hard negatives.
        temperature: > 0, no unit. A number or a 0-d float tensor, which may require grad. (1 + |m|) / temperature +
            hard_negative_weight may be 1e6 at most (1e12 for float64) where rows are normalised: cosines resolve no
            larger logits. Beyond logits of 3e8 the native kernels give NaN.
        m: hardness of the negatives. A number or a 0-d float tensor, which may require grad.
        positives: (B,) integers: row i's positive is key ``positives[i]``; by default key i, then N >= B.
        hard_negative_weight: added (not divided by temperature) to the logits of row i's own hard negatives, keys
            k B + i for k >= 1; N = (K + 1) B. As in supervised SimCSE.
        query_ids, key_ids: (B,) and (N,) integers. A key with the row's id that is not its positive is no negative.
        exclude_above: a key with s_ij > s_i,pos + exclude_above is no negative (cosine units; compared in float32, not
            differentiated).
        symmetric: mean of the row and column losses; N = B and default positives only.
        normalize: False where rows have unit norm already; dot products outside [-1, 1] stay correct.
        weight: (B,) floats, may require grad; "mean" is then sum(w L) / sum(w).
        reduction: "mean", "sum" or "none" (the B row losses, times their weights).
        backend: "auto", "reference", "torch", "cpu", "triton" or "cuda"; see ``pycse.info()``. A named backend never
            falls back.
        validate: also check tensor values (positives, temperature, m) on a GPU, which waits for it. On a CPU they are
            always checked. Unchecked, a bad value gives NaN in its rows.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or (B,) for "none". A row left with its positive only has
        loss 0. Gradients have the inputs' dtype. Under ``torch.no_grad()`` no gradients are computed.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: Hou & Li, "Improving Contrastive Learning of Sentence Embeddings with Focal-InfoNCE", Findings of EMNLP 2023
    (arXiv 2310.06918), eq. 5. The modulation is differentiated through.
    """
    return _contrastive(
        z1, z2, temperature, m, True, positives, hard_negative_weight, query_ids, key_ids, exclude_above, symmetric,
        normalize, weight, reduction, backend, validate,
    )  # fmt: skip


@recordable
def fused_infonce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.05,
    *,
    positives: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_above: float | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    r"""InfoNCE (SimCSE's loss), without an N x N matrix.

    .. code-block:: text

        l_ij = <z1_i, z2_j> / (|z1_i| |z2_j| temperature)
        L_i  = logsumexp_j l_ij - l_ii,    loss = mean_i L_i

    Arguments, results and errors are those of :func:`fused_focal_infonce`, which differs in its logits only.

    Source: Gao, Yao & Chen, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", EMNLP 2021
    (arXiv 2104.08821), eq. 1.
    """
    return _contrastive(
        z1, z2, temperature, 0.0, False, positives, hard_negative_weight, query_ids, key_ids, exclude_above, symmetric,
        normalize, weight, reduction, backend, validate,
    )  # fmt: skip


def number_or_tensor(value: float | Tensor) -> tuple[Tensor | None, float]:
    return (value, 1.0) if isinstance(value, Tensor) else (None, float(value))


def as_long(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.dtype == torch.int64 else value.long()


def _contrastive(
    z1: Any,
    z2: Any,
    temperature: Any,
    m: Any,
    focal: bool,
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
) -> Tensor:
    validation.contrastive(
        z1, z2, temperature, m, positives, hard_negative_weight, query_ids, key_ids, exclude_above, symmetric,
        normalize, weight, reduction, backend, validate,
    )  # fmt: skip
    tau, tau_value = number_or_tensor(temperature)
    margin, margin_value = number_or_tensor(m)
    positives, query_ids, key_ids = as_long(positives), as_long(query_ids), as_long(key_ids)
    excluded = None if exclude_above is None else float(exclude_above)
    if backend == "reference":  # plain PyTorch: its own autograd, to any order
        if validate or z1.device.type == "cpu":
            validation.check_values(z1, z2, tau, margin, weight, positives, focal, normalize)
        return backends.module("reference", z1.device.type, "contrastive").contrastive(
            Contrastive(
                z1,
                z2,
                temperature,
                m,
                focal,
                positives,
                query_ids,
                key_ids,
                weight,
                float(hard_negative_weight),
                excluded,
                symmetric,
                normalize,
                reduction,
            )  # fmt: skip
        )
    return ops.contrastive_loss(
        z1, z2, tau, margin, weight, positives, query_ids, key_ids, tau_value, margin_value, focal,
        float(hard_negative_weight), excluded, symmetric, normalize, reduction, backend, validate,
    )  # fmt: skip
