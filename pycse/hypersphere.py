"""Alignment and uniformity of embeddings on the unit hypersphere. Each validates its arguments and calls one
operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pycse import ops, validation
from pycse.problem import Alignment, Uniformity
from pycse.transforms import recordable


@recordable
def alignment(x: Tensor, y: Tensor, *, normalize: bool = True, group: Any = None, backend: str = "auto") -> Tensor:
    r"""Alignment: the mean squared distance of positive pairs. 0 is perfect, 4 the worst.

    .. code-block:: text

        alignment = mean_i |xhat_i - yhat_i|^2,    xhat = x / |x|

    Args:
        x, y: (B, D) embeddings, row i of both a positive pair; float32, float64, bfloat16 or float16, same dtype and
            device. A row with norm <= 1e-12 counts as 0 and gets gradient 0.
        normalize: False takes the rows as they are.
        group: None, or the processes that share the batch, as in :func:`pycse.fused_focal_infonce`.
        backend: as in :func:`pycse.fused_focal_infonce`.

    Returns:
        0-d, float32 (float64 for float64 inputs). Gradients have the inputs' dtype; memory beyond them is O(D).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020 (arXiv 2005.10242), with exponent 2.
    """

    def problem(x: Tensor, y: Tensor) -> Alignment:
        validation.alignment(x, y, normalize, backend)
        return Alignment(x, y, normalize)

    if group is not None:
        from pycse import distributed

        return distributed.alignment(problem, x, y, group, backend)
    return ops.alignment(problem(x, y), backend)


@recordable
def uniformity(
    x: Tensor, t: float = 2.0, *, normalize: bool = True, group: Any = None, backend: str = "auto"
) -> Tensor:
    r"""Uniformity: log of the mean Gaussian potential of all pairs, without an N x N matrix. Lower is more uniform.

    .. code-block:: text

        uniformity = log( mean_{i < j} exp(-t |xhat_i - xhat_j|^2) ),    xhat = x / |x|

    Args:
        x: (N, D) embeddings, N >= 2; float32, float64, bfloat16 or float16. A row with norm <= 1e-12 counts as 0 and
            gets gradient 0.
        t: > 0 and at most 1e6, no unit. Up to 20 the exponentials fit float32 without a search for the largest one.
        normalize: False takes the rows as they are. Exponents are differences of t |x_i|^2, so in float32 this may be
            1e6 at most (t itself for unit rows); beyond that digits are lost, and at last everything.
        group: None, or the processes that share the rows, as in :func:`pycse.fused_focal_infonce`: every rank has the
            uniformity of all of them.
        backend: as in :func:`pycse.fused_focal_infonce`.

    Returns:
        0-d, float32 (float64 for float64 inputs). Gradients have the inputs' dtype. Memory: O(c N) and one copy of x,
        two with gradients; 3 N^2 D operations.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: Wang & Isola 2020 (arXiv 2005.10242), with the pairs i = j left out.
    """

    def problem(x: Tensor) -> Uniformity:
        validation.uniformity(x, t, normalize, backend)
        return Uniformity(x, float(t), normalize=normalize)

    if group is not None:
        from pycse import distributed

        return distributed.uniformity(problem, x, group, backend)
    return ops.uniformity(problem(x), backend)
