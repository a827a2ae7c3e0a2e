"""Uniformity, the row kernel: similarities to exponentials of distances, one program a row.

Symbols (kernels/README.md), panel of c rows I from row i0 against the n keys from i0 on; k a row of it, j a column:
    E_kj = 2^(u S_kj + bias_k + bias_j),  0 at j = k            exp(-t |zhat_k - zhat_j|^2) times a constant
    sums_k = sum_{j < c} E_kj + 2 sum_{j >= c} E_kj        keys behind the panel's rows stand for their mirror images
S (c, n) in z's type, bias and sums (N,) in the accumulation type. Stored: sums; E over S with GRAD. Memory: O(1)
beyond.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import number


@triton.jit
def rows(S, bias, sums, u, i0, c, n, ld, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    ACC: tl.constexpr = sums.dtype.element_ty
    k = tl.program_id(0)
    S += k.to(tl.int64) * ld
    bias += i0
    u = number(u, ACC)
    own = tl.load(bias + k)
    total = tl.zeros([BLOCK], ACC)
    for a in range(0, n, BLOCK):
        j = a + tl.arange(0, BLOCK)
        s = tl.load(S + j, mask=j < n, other=0).to(ACC)
        e = tl.exp2(u * s + (own + tl.load(bias + j, mask=j < n, other=float("-inf"))))
        e = tl.where(j == k, 0.0, e)
        total += tl.where(j < c, e, 2 * e)
        if GRAD:
            tl.store(S + j, e.to(S.dtype.element_ty), mask=j < n)
    tl.store(sums + i0 + k, tl.sum(total, 0))
