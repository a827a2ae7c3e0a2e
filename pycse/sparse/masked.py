"""masked_linear: a linear layer under any mask, and the same product in PyTorch's own operators."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from pycse import transforms, validation
from pycse.choices import BACKEND_CHOICES
from pycse.ops import sparse as ops
from pycse.pattern import pack_mask, unpack_mask

_is_exporting = getattr(torch.compiler, "is_exporting", None)  # torch >= 2.7


@transforms.recordable
def masked_linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    r"""A linear layer under a mask, with no copy of W ⊙ M kept for backward.

    .. code-block:: text

        y = x (W ⊙ M)^T + b,    dX = dY (W ⊙ M),    dW = (dY^T X) ⊙ M

    The products are dense: any mask works and none is faster than F.linear. Use :class:`SparseLinear` to skip zeros.

    Args:
        x: (..., in); float32, float64, bfloat16 or float16.
        weight: (out, in), x's dtype. Values outside the mask count as 0 and get a gradient of exactly 0.
        mask: bool (out, in), True where a weight is kept; or the same packed, int32 (out, ceil(in / 32)) with bit j of
            word k for column 32 k + j (``pycse.sparse.pack_mask``).
        bias: (out,) or None.
        backend: "auto", "reference", "torch", "cpu", "triton" or "cuda"; see ``pycse.info()``.

    Returns:
        (..., out) in x's dtype; under autocast as F.linear.

    Under torch.func's transforms, in forward-mode AD and in what is traced or exported it is F.linear of W ⊙ M, in
    PyTorch's own operators. Nothing of the mask is kept between calls: it may change. Packing it takes as long as
    reading W; pack it once to save that.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named, before any work.
        RuntimeError: the backend named cannot run here.
    """
    if any(isinstance(t, transforms.Proxy) for t in (x, weight, mask, bias)):
        raise transforms.Symbolic
    packed = isinstance(mask, Tensor) and mask.dtype == torch.int32
    if not ops.traced():  # whose sizes warn when they are compared
        validation.linear(x, weight, bias)
        (validation.packed_mask if packed else validation.linear_mask)("mask", mask, weight)
        validation.choice("backend", backend, BACKEND_CHOICES)
    if composed():
        return dense(x, weight, unpack_mask(mask, weight.shape[1]) if packed else mask, bias)
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        # Saved for backward, where gradients are asked for nevertheless.
        bits = mask if packed else pack_mask(mask)
        bits = bits.clone() if bits.is_inference() else bits
    y = ops.masked_linear(x.reshape(-1, x.shape[-1]), weight, bias, bits, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


def dense(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of W ⊙ M."""
    return F.linear(x, weight.masked_fill(~mask, 0), bias)


def composed() -> bool:
    """Whether products are to be written in PyTorch's own operators, for who looks through them."""
    if torch.compiler.is_compiling():
        # An exported program is to run without pycse, and to be turned into ONNX.
        return not torch.compiler.is_dynamo_compiling() if _is_exporting is None else _is_exporting()
    return ops.transformed() or ops.traced()
