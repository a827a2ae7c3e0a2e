"""What the Triton kernels of the contrastive losses share, on scalars or tensors of any shape (kernels/README.md names
them).

A logit is data, quadratics of the cosine similarity s; pycse/logits.py says which loss has which numbers:

    positive             l = (pos_q s + pos_b) s + pos_c      l' = 2 pos_q s + pos_b
    negative             l = (q s + b) s                      l' = 2 q s + slope
    own hard negative    l = (q s + b) s + own_b s + own_c    l' = 2 q s + slope
    L     = log(1 + z_neg / e_pos)        a row's loss
    f     = coef / (z_neg + e_pos)        its factor: G = e l' r in units of it
    G_pos = -z_neg l'_pos r_pos           the same, from the negatives' sum: a confident row keeps its digits
    dL/dq = sum P s^2, dL/db = sum P s    over the negatives, P = dL/dl;  P s^2, P s, P of the positive for its q, b, c

LINEAR: pos_q = q = 0 is known, so that l is one multiplication and l' a number. Exponentials are powers of 2, one
instruction on a GPU: inside the kernels logits are in bits, l / log 2. Nothing is stored here. Numbers (coefficients,
shift, ...) are Python floats or 0-d tensors, which the kernel reads itself; optional arguments are None: own_c
where own hard negatives have no more than others, own_b where it is 0.
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
def logit(s, q, b, LINEAR: tl.constexpr):
    """(q s + b) s in bits."""
    if LINEAR:
        return s * (b * BIT)
    else:
        return (s * (q * BIT) + b * BIT) * s


@triton.jit
def positive_logit(s, pos_q, pos_b, pos_c, LINEAR: tl.constexpr):
    """In bits."""
    return logit(s, pos_q, pos_b, LINEAR) + pos_c * BIT


@triton.jit
def derivative(s, q, slope, LINEAR: tl.constexpr):
    """l' of a negative; of the positive with pos_q and pos_b."""
    if LINEAR:
        return slope
    else:
        return s * (2.0 * q) + slope


@triton.jit
def threshold_of(s_pos, exclude, i, inside, EXCLUDE_BY: tl.constexpr):
    """Above which similarity a key is no negative of row i, or a row none of column i: s_pos + d, s_pos + d |s_pos| or
    d, with d = ``exclude``."""
    d = number_at(exclude, i, inside, s_pos.dtype)
    if EXCLUDE_BY == "relative":
        return s_pos + d * tl.abs(s_pos)
    elif EXCLUDE_BY == "constant":
        return tl.zeros_like(s_pos) + d
    else:
        return s_pos + d


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
def negatives(l, s, j, i, pos, threshold, query_ids, key_ids, own_b, own_c, B, N, rows_inside):
    """l with what row i's own hard negatives (keys k B + i) have more; -inf where key j is no negative of row i."""
    keep = (j < N) & (j != pos)
    if query_ids is not None:
        id_i = tl.load(query_ids + i, mask=rows_inside, other=0)
        id_j = tl.load(key_ids + j, mask=j < N, other=0)
        keep = keep & (id_i != id_j)
    if threshold is not None:
        keep = keep & ~(s > threshold)  # a NaN stays
    if own_c is not None:
        more = number(own_c, l.dtype) * BIT
        if own_b is not None:
            more = s * (number(own_b, l.dtype) * BIT) + more
        l = tl.where(tl.where(j >= B, j % B, -1) == i, l + more, l)
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
def row_results(z_neg, s_pos, r_pos, top, coef, pos_q, pos_b, pos_c, LINEAR: tl.constexpr):
    """l_pos in bits, the row's loss, f and G_pos / f, from the sum over its negatives of exp2(l - top)."""
    l_pos = positive_logit(s_pos, pos_q, pos_b, pos_c, LINEAR)
    e_pos = tl.exp2(l_pos - top)
    ratio = z_neg / e_pos
    loss = tl.where(
        ratio > 1,
        (tl.log2(z_neg) + (top - l_pos)) * LOG2 + log1p(e_pos / z_neg),  # the ratio itself may overflow
        log1p(ratio),
    )
    f = coef / (z_neg + e_pos)
    g_pos = -z_neg * derivative(s_pos, pos_q, pos_b, LINEAR) * r_pos
    return l_pos, loss, f, g_pos


@triton.jit
def store_gradients(dlogit, i, B, P_pos, s_pos, P_ss, P_s):
    """Row i of dlogit (5, B): of pos_q, pos_b, pos_c from the positive's P; of q, b from the sums over the negatives of
    P s^2 and P s."""
    at = dlogit + i
    tl.store(at, P_pos * s_pos * s_pos)
    at += B
    tl.store(at, P_pos * s_pos)
    at += B
    tl.store(at, P_pos)
    at += B
    tl.store(at, P_ss)
    at += B
    tl.store(at, P_s)
