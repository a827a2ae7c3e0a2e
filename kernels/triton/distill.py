"""Distillation, the row kernel: the student's similarities and the teachers' to losses and gradients, one program a
row.

Symbols (kernels/README.md), panel of c rows from row i0; j over the row's columns but the diagonal:
    S (c, B)  s_ij, in z's type          T (c, B)  t_ij, in any float type, read only
    p_j = e_j / z,  e_j = exp(s_j / tau_s - top)              q_j = e^t_j / z_t likewise from t_j / tau_t
    q shuffled: q_j = e^t_source / z_t;   averaged: q_j = mean_j / z_t        source, mean (c, B - 1): groups.py
    ce  L = log z - sum q (s / tau_s - top)     kl  L = ce - H(q), q unshuffled      dL/ds_j = (p_j - q_j) / tau_s
    js  L = (KL(q | a) + KL(p | a)) / 2, a = (p + q) / 2       dL/ds_j = p_j (log(p_j / a_j) - KL(p | a)) / (2 tau_s)
    G_j = coef_i dL/ds_j,  0 on the diagonal
Logits are in bits (log 2) where they meet the exponential. Stored: loss (B,); G over S. Memory: O(1) beyond that.
Visits of the row: for the maxima, the sums, KL(. | a) for js, and G.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import BIT, LOG2, number, number_at

SMALLEST = tl.constexpr(1e-37)  # keeps 0 / 0 out of p / a


@triton.jit
def bits_of(X, j, i, B, top, bits, ACC: tl.constexpr):
    """(x_j - top) / tau in bits; -inf on the diagonal and beyond B."""
    x = tl.load(X + j, mask=(j < B) & (j != i), other=float("-inf")).to(ACC)
    return tl.where((j < B) & (j != i), (x - top) * bits, float("-inf"))


@triton.jit
def teacher(T, source, mean, j, i, B, top, bits, ACC: tl.constexpr):
    """e^t as shuffled or averaged; 0 on the diagonal and beyond B."""
    keep = (j < B) & (j != i)
    x = j - (j > i).to(tl.int32)  # the column among those but the diagonal
    if mean is not None:
        return tl.load(mean + x, mask=keep, other=0)
    else:
        if source is not None:
            x = tl.load(source + x, mask=keep, other=0)
            j = x + (x >= i).to(tl.int32)
        t = tl.load(T + j, mask=keep, other=0).to(ACC)
        return tl.where(keep, tl.exp2((t - top) * bits), 0.0)


@triton.jit
def probabilities(S, T, source, mean, j, i, B, top, top_t, bits, bits_t, of_e, of_q, ACC: tl.constexpr):
    p = tl.exp2(bits_of(S, j, i, B, top, bits, ACC)) * of_e
    return p, teacher(T, source, mean, j, i, B, top_t, bits_t, ACC) * of_q


@triton.jit
def relative(p, q):
    """p log2(p / a) with a = (p + q) / 2; 0 for p = 0."""
    return tl.where(p == 0, 0.0, p * tl.log2(tl.where(p == 0, 1.0, p * (2.0 / (p + q + SMALLEST)))))


@triton.jit
def rows(
    S,
    T,
    source,
    mean,
    coef,
    loss,
    inv_tau,
    inv_tau_t,
    i0,
    B,
    ld,
    ld_t,
    DIVERGENCE: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = loss.dtype.element_ty
    k = tl.program_id(0)
    i = i0 + k
    S += k.to(tl.int64) * ld
    T += k.to(tl.int64) * ld_t
    if source is not None:
        source += k.to(tl.int64) * (B - 1)
    if mean is not None:
        mean += k.to(tl.int64) * (B - 1)
    inv_tau = number(inv_tau, ACC)
    bits = inv_tau * BIT
    bits_t = number(inv_tau_t, ACC) * BIT

    best = tl.full([BLOCK], float("-inf"), ACC)
    best_t = tl.full([BLOCK], float("-inf"), ACC)
    for a in range(0, B, BLOCK):
        j = a + tl.arange(0, BLOCK)
        keep = (j < B) & (j != i)
        best = tl.maximum(best, tl.load(S + j, mask=keep, other=float("-inf")).to(ACC))
        best_t = tl.maximum(best_t, tl.load(T + j, mask=keep, other=float("-inf")).to(ACC))
    top = tl.max(best, 0)
    top_t = tl.max(best_t, 0)

    z = tl.zeros([BLOCK], ACC)
    z_t = tl.zeros([BLOCK], ACC)
    cross = tl.zeros([BLOCK], ACC)
    own = tl.zeros([BLOCK], ACC)
    for a in range(0, B, BLOCK):
        j = a + tl.arange(0, BLOCK)
        x = bits_of(S, j, i, B, top, bits, ACC)
        x_t = bits_of(T, j, i, B, top_t, bits_t, ACC)
        e_t = tl.exp2(x_t)
        z += tl.exp2(x)
        z_t += e_t
        if DIVERGENCE != "js":
            q = teacher(T, source, mean, j, i, B, top_t, bits_t, ACC)
            cross += tl.where(q == 0, 0.0, q * x)  # 0 and not 0 * -inf
        if DIVERGENCE == "kl":
            own += tl.where(e_t == 0, 0.0, e_t * x_t)
    total = tl.sum(z, 0)
    of_e = 1.0 / total
    total_t = tl.sum(z_t, 0)
    of_q = 1.0 / total_t

    coef_i = number_at(coef, i, i < B, ACC) * inv_tau
    kl_p = of_e * 0
    if DIVERGENCE == "js":
        sum_p = tl.zeros([BLOCK], ACC)
        sum_q = tl.zeros([BLOCK], ACC)
        for a in range(0, B, BLOCK):
            j = a + tl.arange(0, BLOCK)
            p, q = probabilities(S, T, source, mean, j, i, B, top, top_t, bits, bits_t, of_e, of_q, ACC)
            sum_p += relative(p, q)
            sum_q += relative(q, p)
        kl_p = tl.sum(sum_p, 0)
        result = (kl_p + tl.sum(sum_q, 0)) * 0.5
        coef_i *= LOG2 * 0.5
    else:
        result = tl.log2(total) - tl.sum(cross, 0) * of_q
        if DIVERGENCE == "kl":
            result += tl.sum(own, 0) * of_q - tl.log2(total_t)
    tl.store(loss + i, result * LOG2)

    if GRAD:
        for a in range(0, B, BLOCK):
            j = a + tl.arange(0, BLOCK)
            p, q = probabilities(S, T, source, mean, j, i, B, top, top_t, bits, bits_t, of_e, of_q, ACC)
            if DIVERGENCE == "js":
                G = coef_i * (relative(p, q) - p * kl_p)
            else:
                G = coef_i * (p - q)
            tl.store(S + j, tl.where(j == i, 0.0, G).to(S.dtype.element_ty), mask=j < B)
