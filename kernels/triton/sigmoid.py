"""The row kernel of the sigmoid loss: turns a panel of raw products into losses and gradients, one program a row.

Symbols (kernels/README.md), panel of c rows from row i0; y_ij = -1 where key j is a positive of row i, else 1:
    S (c, N)   S_ij = z1hat_i . z2_j, in z's type      r2 (N,) inverse norms of the keys      s_ij = S_ij r2_j
    x_ij = y_ij (scale s_ij + bias)
    L_i  = sum_j log(1 + exp(x_ij))            max(x, 0) + log1p(u), u = exp(-|x|)
    P_ij = coef_i y_ij sigma(x_ij)             sigma(x) = 1 / (1 + u), or u / (1 + u) where x < 0
    G_ij = P_ij scale r2_j
    dlogit (2, B): sum_j P_ij s_ij, sum_j P_ij            of scale and bias
One positive a row: key ``positives`` [i] (None: i), with s_pos (B,) in place of its rounded s where given; a row whose
positive is no key is NaN. With ids: every key of the row's id. Stored: loss, with GRAD G over S, dlogit where given.
Memory: O(1) beyond that.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import log1p, number, number_at, positive_of


@triton.jit
def rows(
    S,
    r2,
    s_pos,
    positives,
    query_ids,
    key_ids,
    coef,
    loss,
    dlogit,
    scale,
    bias,
    i0,
    B,
    N,
    ld,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    k = tl.program_id(0)
    i = i0 + k
    S += k.to(tl.int64) * ld
    scale, bias = number(scale, ACC), number(bias, ACC)
    coef_i = number_at(coef, i, i < B, ACC)
    if query_ids is not None:
        id_i = tl.load(query_ids + i)
    else:
        pos = positive_of(positives, i, i < B, N)
        coef_i = tl.where(pos >= 0, coef_i, float("nan"))

    losses = tl.zeros([BLOCK], ACC)
    P_s = tl.zeros([BLOCK], ACC)
    P = tl.zeros([BLOCK], ACC)
    for a in range(0, N, BLOCK):
        j = a + tl.arange(0, BLOCK)
        inside = j < N
        r = tl.load(r2 + j, mask=inside, other=0)
        s = tl.load(S + j, mask=inside, other=0).to(ACC) * r
        if query_ids is not None:
            positive = inside & (tl.load(key_ids + j, mask=inside, other=0) == id_i)
        else:
            positive = j == pos
            if s_pos is not None:
                s = tl.where(positive, tl.load(s_pos + i), s)
        x = scale * s + bias
        x = tl.where(positive, -x, x)
        x = tl.where(inside, x, float("-inf"))
        u = tl.exp(-tl.abs(x))
        losses += tl.where(x > 0, x, 0.0) + log1p(u)
        if GRAD:
            g = tl.where(x >= 0, 1.0, u) / (1.0 + u)
            g = tl.where(positive, -g, g) * coef_i
            if dlogit is not None:
                P_s += g * s
                P += g
            tl.store(S + j, (g * (scale * r)).to(S.dtype.element_ty), mask=inside)

    total = tl.sum(losses, 0)
    if query_ids is None:
        total = tl.where(pos >= 0, total, float("nan"))
    tl.store(loss + i, total)
    if dlogit is not None:
        at = dlogit + i
        tl.store(at, tl.sum(P_s, 0))
        tl.store(at + B, tl.sum(P, 0))
