"""What the Triton kernels of the contrastive losses share, on scalars or tensors of any shape (kernels/README.md names
them).

    l(s)  = s (s + m) / tau     slope = tau l' = 2 s + m     negatives of Focal-InfoNCE (arXiv 2310.06918, eq. 5)
    l_pos = s^2 / tau           slope = 2 s                  its positive: m = 0
    l(s)  = s / tau             slope = 1                    InfoNCE, both
    L     = log(1 + z_neg / e_pos)                           a row's loss
    f     = coef / ((z_neg + e_pos) tau)                     its factor
    G_pos = -z_neg slope_pos r_pos        in units of f: from the negatives' sum, so that a confident row keeps its digits

Exponentials are powers of 2, one instruction on a GPU: inside the kernels logits are in bits, l / log 2 (``bits`` is
1 / (tau log 2)). Nothing is stored here. Numbers (tau, m, ...) are Python floats or 0-d tensors, which the kernel reads
itself; optional arguments are None.
"""

import triton
import triton.language as tl

LOG2 = tl.constexpr(0.6931471805599453)  # log 2
BIT = tl.constexpr(1.4426950408889634)  # 1 / log 2


@triton.jit
def number(x, ACC: tl.constexpr):
    """A Python float, or the content of a 0-d tensor."""
    if isinstance(x, tl.tensor):
        if x.dtype.is_ptr():
            return tl.load(x).to(ACC)
        else:
            return x.to(ACC)
    else:
        return tl.full((), x, ACC)


@triton.jit
def number_at(x, i, inside, ACC: tl.constexpr):
    """One number for all rows, or row i's."""
    if isinstance(x, tl.tensor):
        if x.dtype.is_ptr():
            return tl.load(x + i, mask=inside, other=0).to(ACC)
        else:
            return x.to(ACC)
    else:
        return tl.full((), x, ACC)


@triton.jit
def inverse(tau, ACC: tl.constexpr):
    """1/tau; NaN for a temperature <= 0, whose value no host has seen."""
    tau = number(tau, ACC)
    return tl.where(tau > 0, 1.0 / tau, float("nan"))


@triton.jit
def logit(s, m, bits, FOCAL: tl.constexpr):
    if FOCAL:
        return s * (s + m) * bits
    else:
        return s * bits


@triton.jit
def slope(s, m, FOCAL: tl.constexpr):
    """tau l'(s): the factor 1/tau is the same for a whole row and is applied once, with the row's other factors."""
    if FOCAL:
        return 2.0 * s + m
    else:
        return s * 0.0 + 1.0


@triton.jit
def positive_of(positives, i, inside, N):
    """Row i's positive; -1 where it is no key."""
    if positives is None:
        pos = i
    else:
        pos = tl.load(positives + i, mask=inside, other=-1)
    return tl.where(inside & (pos >= 0) & (pos < N), pos, -1).to(tl.int32)


@triton.jit
def positive_cosine(S, s_pos, i, pos, r_pos):
    """Row i's s_pos where the caller has it already, else from its row S of the panel; NaN without a positive."""
    if s_pos is not None:
        s = tl.load(s_pos + i)
    else:
        s = tl.load(S + pos, mask=pos >= 0, other=0).to(r_pos.dtype) * r_pos
    # Every thread has read its row's positive before one of them writes G over it.
    tl.debug_barrier()
    return tl.where(pos >= 0, s, float("nan"))


@triton.jit
def negatives(l, s, j, i, pos, threshold, query_ids, key_ids, hard_weight, B, N, rows_inside):
    """l plus the weight of row i's own hard negatives (keys k B + i); -inf where key j is no negative of row i."""
    keep = (j < N) & (j != pos)
    if query_ids is not None:
        id_i = tl.load(query_ids + i, mask=rows_inside, other=0)
        id_j = tl.load(key_ids + j, mask=j < N, other=0)
        keep = keep & (id_i != id_j)
    if threshold is not None:
        keep = keep & ~(s > threshold)  # a NaN stays
    if hard_weight is not None:
        own = tl.where(j >= B, j % B, -1) == i
        l = tl.where(own, l + number(hard_weight, l.dtype) * BIT, l)
    return tl.where(keep, l, float("-inf"))


@triton.jit
def resolved(top):
    """A row's largest logit; NaN where it is so large that its own rounding decides the row."""
    LARGEST: tl.constexpr = 2.0**58 if top.dtype == tl.float64 else 2.0**29
    return tl.where(tl.abs(top) > LARGEST, float("nan"), top)


@triton.jit
def probability(x):
    """2^x where only the rounding of a log-sum makes x positive."""
    return tl.exp2(tl.where(x > 0, 0.0, x))


@triton.jit
def log1p(x):
    """log(1 + x) with all its digits for small x >= 0; the rounding of 1 + x cancels in the quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log_add(x, y):
    """log(exp(x) + exp(y)), y finite."""
    top = tl.maximum(x, y)
    return top + log1p(tl.exp(tl.minimum(x, y) - top))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def row_results(z_neg, s_pos, r_pos, top, coef, inv_tau, FOCAL: tl.constexpr):
    """l_pos in bits, the row's loss, f and G_pos / f, from the sum over its negatives of exp2(l - top)."""
    l_pos = logit(s_pos, 0.0, inv_tau * BIT, FOCAL)
    e_pos = tl.exp2(l_pos - top)
    ratio = z_neg / e_pos
    loss = tl.where(
        ratio > 1,
        (tl.log2(z_neg) + (top - l_pos)) * LOG2 + log1p(e_pos / z_neg),  # the ratio itself may overflow
        log1p(ratio),
    )
    f = coef / (z_neg + e_pos) * inv_tau
    g_pos = -z_neg * slope(s_pos, 0.0, FOCAL) * r_pos
    return l_pos, loss, f, g_pos
