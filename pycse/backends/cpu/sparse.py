"""The C++ kernels of kernels/cpu/sparse.h; under a bit mask PyTorch's GEMMs of W ⊙ M, which lives for one product.

float16 is computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pycse.backends.addresses import CODES, pointer
from pycse.backends.cpu.norms import HUGE
from pycse.kernels import native
from pycse.pattern import Pattern


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.float16 else t


def _empty(rows: int, columns: int, like: Tensor) -> Tensor:
    t = torch.empty(rows, columns, dtype=like.dtype, device=like.device)
    if t.nbytes >= HUGE:
        native().prefer_huge_pages(t.data_ptr(), t.nbytes)
    return t


def _pattern(pattern: Pattern):
    if pattern.native is None:
        tensors = (t.data_ptr() for t in pattern.tensors)
        pattern.native = native().SparsePattern(*pattern.shape, pattern.block, *tensors, pointer(pattern.packed))
    return pattern.native


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, transposed: bool) -> Tensor:
    dtype = x.dtype
    x, weight, bias = _wide(x), _wide(weight), None if bias is None else _wide(bias).contiguous()
    y = _empty(x.shape[0], pattern.shape[1 if transposed else 0], x)
    native().sparse_product(
        _pattern(pattern), CODES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        pointer(bias), y.data_ptr(), x.shape[0], transposed, torch.get_num_threads(),
    )  # fmt: skip
    return y.to(dtype)


def plan(pattern: Pattern) -> None:
    """Gives a pattern of single weights ``plan`` and ``t_plan``: the orders in which its kernels use them."""
    if pattern.block > 1:
        return
    out, in_ = pattern.shape
    cols = pattern.cols.long()
    rows = torch.arange(out, dtype=torch.int64, device=cols.device).repeat_interleave(pattern.ptr.long().diff())
    at = torch.arange(cols.shape[0], dtype=torch.int64, device=cols.device)
    t_at = cols.argsort(stable=True)  # where each weight stands in ``cols``, in the order of columns
    pattern.plan, pattern.t_plan = _order(rows, cols, at, out, in_), _order(cols[t_at], rows[t_at], t_at, in_, out)
    pattern.native = None


def _order(result: Tensor, feature: Tensor, source: Tensor, results: int, features: int) -> Tensor:
    """The order in which a kernel uses single weights: chunk of features by chunk, in each results with equally
    many kept weights together, fewest first, then by result.

    ``result`` and ``feature`` (nnz), sorted by result and then feature, are what each kept weight multiplies into and
    with; ``source`` says where it stands in ``Pattern.cols``. One int32 tensor, its parts one after the other:

    - lengths (chunks, chunk + 1): how many results have so many kept weights in a chunk,
    - order (chunks, results): the results,
    - source (nnz): in the order of use,
    - at (nnz), 16-bit: in the order of use, ``SPARSE_AT_STEP`` times the feature's place inside its chunk.
    """
    chunk, step = native().SPARSE_CHUNK, native().SPARSE_AT_STEP
    chunks = max(1, -(-features // chunk))
    group = feature // chunk * results + result
    many = torch.bincount(group, minlength=chunks * results).view(chunks, results)
    lengths = many.new_zeros(chunks, chunk + 1).scatter_add_(1, many, torch.ones_like(many))
    order = many.argsort(dim=1, stable=True)
    turn = order.argsort(dim=1) + torch.arange(chunks, dtype=torch.int64, device=order.device)[:, None] * results
    use = turn.flatten()[group].argsort(stable=True)
    at = F.pad((feature[use] % chunk * step).short(), (0, use.shape[0] % 2)).view(torch.int32)
    return torch.cat([*(t.flatten().int() for t in (lengths, order, source[use])), at])


def pack(weight: Tensor, pattern: Pattern) -> None:
    """Gives a pattern of single weights ``packed``: the weights in the order in which ``linear`` uses them."""
    if pattern.block > 1:
        return
    weight = _wide(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    packed = torch.empty(pattern.nnz, dtype=dtype, device=weight.device)
    native().sparse_pack(
        _pattern(pattern), CODES[weight.dtype], weight.data_ptr(), weight.stride(0), packed.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    pattern.packed, pattern.native = packed, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    return _product(x, weight, bias, pattern, False)


def dx(dy: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    return _product(dy, weight, None, pattern, True)


def dw(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    dtype = x.dtype
    dy, x = _wide(dy), _wide(x)
    result = _empty(pattern.shape[0], pattern.shape[1], x)
    native().sparse_outer(
        _pattern(pattern), CODES[x.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), result.data_ptr(),
        x.shape[0], torch.get_num_threads(),
    )  # fmt: skip
    return result.to(dtype)


def _masked(weight: Tensor, bits: Tensor, result: Tensor | None = None) -> Tensor:
    """W ⊙ M, in W's place where ``result`` is W."""
    result = _empty(weight.shape[0], weight.shape[1], weight) if result is None else result
    native().mask_weight(
        CODES[weight.dtype], weight.data_ptr(), weight.stride(0), bits.data_ptr(), *weight.shape, result.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def masked(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(_wide(x), _masked(_wide(weight), bits), None if bias is None else _wide(bias)).to(x.dtype)


def masked_dx(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    return (_wide(dy) @ _masked(_wide(weight), bits)).to(dy.dtype)


def masked_dw(dy: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    product = _wide(dy).t() @ _wide(x)
    return _masked(product, bits, product).to(x.dtype)
