"""The rows' log-sums as an operator of their own, for losses that pycse does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycse import ops
from pycse.functional import problem_of
from pycse.problem import Contrastive
from pycse.transforms import recordable
from pycse.validation import embeddings, flag


@recordable
def logsumexp_similarities(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.05,
    *,
    positives: Tensor | None = None,
    include_positive: bool = True,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_above: float | Tensor | None = None,
    exclude_by: str = "absolute",
    normalize: bool = True,
    group: Any = None,
    exchange: str = "auto",
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    r"""Each row's log of the sum over keys of exp(similarity / temperature), without an N x N matrix; differentiable.

    .. code-block:: text

        s_ij  = <z1_i, z2_j> / (|z1_i| |z2_j|)
        LSE_i = log sum_j exp(s_ij / temperature)

    The building block of contrastive losses: cross entropy is ``(LSE - s_pos / temperature).mean()``, decoupled
    contrastive learning the same with ``include_positive=False``; docs/losses.md has these and the debiased loss.

    Args:
        z1: (B, D) embeddings of the rows; float32, float64, bfloat16 or float16, any scale. A row with norm <= 1e-12
            counts as 0 and gets gradient 0; an infinite number or NaN makes its LSE NaN.
        z2: (N, D) embeddings of the keys, same dtype and device.
        temperature: > 0, no unit. A number or a 0-d float tensor, which may require grad. Where rows are normalised it
            may be 1e-6 at least (1e-12 for float64): cosines resolve no sharper logits.
        positives: (B,) integers: row i's positive is key ``positives[i]``; by default key i. It is what
            include_positive, ids and exclude_above speak of; where none of them is given there is none, and N may be
            anything.
        include_positive: False leaves the positive out of the sum.
        query_ids, key_ids: (B,) and (N,) integers. A key with the row's id that is not its positive is left out.
        exclude_above, exclude_by: keys whose similarity is above this bound are left out, as in
            :func:`pycse.fused_focal_infonce`; not differentiated.
        normalize: False where rows have unit norm already; dot products outside [-1, 1] stay correct.
        group: as in :func:`pycse.fused_focal_infonce`, with reduction "none": the sums are over all ranks' keys.
        exchange: likewise.
        backend: as in :func:`pycse.fused_focal_infonce`; "cuda" has no kernels for it yet.
        validate: also check values (positives, temperature) on a GPU, which waits for it. On a CPU they always are.

    Returns:
        (B,) log-sums, float32 (float64 for float64 inputs); -inf, without a gradient, for a row without a key. O(c N)
        memory. As each row's upstream gradient is known in backward only, the products of forward are made
        again there: 8 B N D operations.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: pycse's own; for its use Yeh et al., "Decoupled Contrastive Learning", ECCV 2022 (arXiv 2110.06848), and
    Chuang et al., "Debiased Contrastive Learning", NeurIPS 2020 (arXiv 2007.00224).
    """
    batch = dict(
        positives=positives, query_ids=query_ids, key_ids=key_ids, exclude_above=exclude_above, guides=None,
        guide_weights=None, guide_logits=None, negatives=None, weight=None,
    )  # fmt: skip

    def problem(z1: Any, z2: Any, **batch: Any) -> Contrastive:
        flag("include_positive", include_positive)
        embeddings("z1", z1)
        asked = (batch[name] is not None for name in ("positives", "query_ids", "exclude_above"))
        if include_positive and not any(asked):
            batch["positives"] = _any_key(z1)
        options: dict[str, Any] = dict(
            positive_margin=0.0, hard_negative_weight=0.0, hardness=0.0, hardness_mode="all_negatives",
            exclude_by=exclude_by, guide_above=0.0, guide_by="absolute", symmetric=False, directions=("qd",),
            partition="joint", normalize=normalize, reduction="none", backend=backend, validate=validate,
            output="logsum" if include_positive else "negatives",
        )  # fmt: skip
        return problem_of("infonce", z1, z2, temperature, 0.0, batch, options)

    if group is not None:
        from pycse import distributed

        return distributed.contrastive(
            "logsumexp_similarities", lambda **given: (problem(**given),), {"z1": z1, "z2": z2, **batch}, group=group,
            exchange=exchange, backend=backend, validate=validate,
        )[0]  # fmt: skip
    return ops.contrastive(problem(z1, z2, **batch), backend, validate)


def _any_key(z1: Tensor) -> Tensor:
    """Where nothing asks for a positive every key counts alike: it may be the first."""
    return torch.zeros(z1.shape[0], dtype=torch.int64, device=z1.device)
