"""Linear layers whose weights W (out, in) are kept in square blocks, or under a mask of bits.

Symbols: x (T, in), dy (T, out), ``block`` the side of the blocks, ptr and index the kept blocks of each block row (of
each block column for dx), ascending.
    linear     y  = x W^T + b     a program: TOKENS tokens x a block row; K runs over the columns of its blocks
    dx         dX = dY W          a program: TOKENS tokens x a block column; K over the rows of its blocks
    dw         dW = dY^T X        a program: a block row x GROUP of its blocks side by side; K over tokens
    masked_*   the same with dense tiles; bits (out, words), bit j of word k is column 32 k + j, mask W's tiles as they
               are loaded, and dW's before they are stored
Blocks are read where they stand in W. Sums are ACC (fp32, fp64 for fp64), rounded once. dw splits the tokens where
programs are few: each split stores its sums, add_splits adds them in order. No float atomics.
Memory: dw's partial sums, splits x kept weights; nothing else.
"""

import triton
import triton.language as tl


@triton.jit
def gathered(index, k, end, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Where elements k, k + 1, ... of the kept blocks side by side stand, DEPTH of them; past the end, as in block 0.

    k is a multiple of the smaller of BLOCK and DEPTH: so many are neighbours in memory, the first at a multiple.
    """
    RUN: tl.constexpr = BLOCK if BLOCK < DEPTH else DEPTH
    if DEPTH <= BLOCK:
        slot = k // BLOCK
        at = tl.load(index + slot, mask=slot < end, other=0) * BLOCK + k % BLOCK + tl.arange(0, DEPTH)
    else:
        kk = k + tl.arange(0, DEPTH)
        slot = kk // BLOCK
        at = tl.load(index + slot, mask=slot < end, other=0) * BLOCK + kk % BLOCK
    return tl.max_contiguous(tl.multiple_of(at, RUN), RUN)


@triton.jit
def linear(
    x, w, bias, y, ptr, index, T, out, ld_x, ld_w,
    ACC: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = out // BLOCK
    row = tl.program_id(0) % rows
    t = tl.program_id(0) // rows * TOKENS + tl.arange(0, TOKENS)
    o = row * BLOCK + tl.arange(0, BLOCK)
    x += (t % T).to(tl.int64)[:, None] * ld_x  # tokens past the end read real ones again; they are not stored
    w += o.to(tl.int64)[None, :] * ld_w
    begin = tl.load(ptr + row)
    end = tl.load(ptr + row + 1)
    sums = tl.zeros([TOKENS, BLOCK], ACC)
    at = gathered(index, begin * BLOCK, end, BLOCK, DEPTH)
    for k in range(begin * BLOCK, end * BLOCK, DEPTH):
        kk = k + tl.arange(0, DEPTH)
        inside = kk < end * BLOCK
        a = tl.load(x + at[None, :], mask=inside[None, :], other=0)
        b = tl.load(w + at[:, None], mask=inside[:, None], other=0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
        at = gathered(index, k + DEPTH, end, BLOCK, DEPTH)  # its loads wait for no other
    if bias is not None:
        sums += tl.load(bias + o).to(ACC)[None, :]
    tl.store(y + t.to(tl.int64)[:, None] * out + o[None, :], sums.to(y.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit
def dx(
    dy, w, result, ptr, index, T, in_, ld_dy, ld_w,
    ACC: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = in_ // BLOCK
    column = tl.program_id(0) % columns
    t = tl.program_id(0) // columns * TOKENS + tl.arange(0, TOKENS)
    j = column * BLOCK + tl.arange(0, BLOCK)
    dy += (t % T).to(tl.int64)[:, None] * ld_dy
    begin = tl.load(ptr + column)
    end = tl.load(ptr + column + 1)
    sums = tl.zeros([TOKENS, BLOCK], ACC)
    at = gathered(index, begin * BLOCK, end, BLOCK, DEPTH)
    for k in range(begin * BLOCK, end * BLOCK, DEPTH):
        kk = k + tl.arange(0, DEPTH)
        inside = kk < end * BLOCK
        a = tl.load(dy + at[None, :], mask=inside[None, :], other=0)
        b = tl.load(w + at.to(tl.int64)[:, None] * ld_w + j[None, :], mask=inside[:, None], other=0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
        at = gathered(index, k + DEPTH, end, BLOCK, DEPTH)  # its loads wait for no other
    tl.store(
        result + t.to(tl.int64)[:, None] * in_ + j[None, :], sums.to(result.dtype.element_ty), mask=(t < T)[:, None]
    )


@triton.jit
def dw(
    dy, x, result, partial, ptr, index, T, out, in_, each, kept, ld_dy, ld_x,
    ACC: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``each`` tokens to a split; ``partial`` (splits, kept weights) or None: one split stores dW itself."""
    WIDE: tl.constexpr = GROUP * BLOCK
    groups = tl.cdiv(in_ // BLOCK, GROUP)
    rows = out // BLOCK
    program = tl.program_id(0)
    row = program // groups % rows
    split = program // groups // rows
    first = tl.load(ptr + row) + program % groups * GROUP
    end = tl.load(ptr + row + 1)
    if first < end:
        n = first * BLOCK + tl.arange(0, WIDE)
        o = row * BLOCK + tl.arange(0, BLOCK)
        at = gathered(index, first * BLOCK, end, BLOCK, WIDE)
        inside = n < end * BLOCK
        sums = tl.zeros([BLOCK, WIDE], ACC)
        start = split * each
        stop = tl.minimum(start + each, T)
        for k in range(start, stop, DEPTH):
            t = k + tl.arange(0, DEPTH)
            a = tl.load(dy + t.to(tl.int64)[None, :] * ld_dy + o[:, None], mask=(t < stop)[None, :], other=0)
            b = tl.load(
                x + t.to(tl.int64)[:, None] * ld_x + at[None, :], mask=(t < stop)[:, None] & inside[None, :], other=0
            )
            sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
        if partial is not None:
            r = tl.arange(0, BLOCK)
            to = (n // BLOCK).to(tl.int64)[None, :] * (BLOCK * BLOCK) + r[:, None] * BLOCK + (n % BLOCK)[None, :]
            tl.store(partial + split.to(tl.int64) * kept + to, sums, mask=inside[None, :])
        else:
            to = result + o.to(tl.int64)[:, None] * in_ + at[None, :]
            tl.store(to, sums.to(result.dtype.element_ty), mask=inside[None, :])


@triton.jit
def add_splits(partial, result, ptr, index, splits, rows, steps, kept, in_, BLOCK: tl.constexpr):
    """A program adds up a kept block. Its block row is the last that begins at it or before: ``steps`` halvings."""
    slot = tl.program_id(0)
    low = 0
    high = rows
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(ptr + middle) <= slot
        low = tl.where(before & (high - low > 1), middle, low)
        high = tl.where(before, high, tl.maximum(middle, low + 1))
    r = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    at = partial + slot.to(tl.int64) * (BLOCK * BLOCK) + r * BLOCK + c
    sums = tl.load(at)
    for _ in range(1, splits):
        at += kept
        sums += tl.load(at)
    j = tl.load(index + slot) * BLOCK + c
    tl.store(result + (low * BLOCK + r).to(tl.int64) * in_ + j, sums.to(result.dtype.element_ty))


@triton.jit
def mark(ptr, index, bits, words, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """The bits (words a row) of a row of a pattern of single weights. Each bit is set once: sums of them are their
    union."""
    row = tl.program_id(0)
    bits += row.to(tl.int64) * words
    begin = tl.load(ptr + row)
    end = tl.load(ptr + row + 1)
    for a in range(0, words, WORDS):
        word = a + tl.arange(0, WORDS)
        own = tl.zeros([WORDS], tl.int32)
        for k in range(begin, end, BLOCK):
            kk = k + tl.arange(0, BLOCK)
            j = tl.load(index + kk, mask=kk < end, other=-32)
            own += tl.sum(tl.where((j // 32)[:, None] == word[None, :], (1 << (j & 31))[:, None], 0), 0)
        tl.store(bits + word, own, mask=word < words)


@triton.jit
def keep(w, bits, row, column, inside, words):
    """w where the bit of (row, column) is set, 0 elsewhere, whatever stood there."""
    word = tl.load(bits + row.to(tl.int64) * words + column // 32, mask=inside, other=0)
    return tl.where((word >> (column % 32)) & 1 != 0, w, 0)


@triton.jit
def masked_linear(
    x, w, bits, bias, y, T, out, in_, words, ld_x, ld_w,
    ACC: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(out, WIDE)
    t = tl.program_id(0) // tiles * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(0) % tiles * WIDE + tl.arange(0, WIDE)
    x += (t % T).to(tl.int64)[:, None] * ld_x
    sums = tl.zeros([TOKENS, WIDE], ACC)
    for k in range(0, in_, DEPTH):
        j = k + tl.arange(0, DEPTH)
        a = tl.load(x + j[None, :], mask=(j < in_)[None, :], other=0)
        b = tl.load(
            w + o.to(tl.int64)[None, :] * ld_w + j[:, None], mask=(j < in_)[:, None] & (o < out)[None, :], other=0
        )
        word = tl.load(bits + o.to(tl.int64) * words + k // 32, mask=o < out, other=0)  # DEPTH divides 32
        b = tl.where(word[None, :] >> (j % 32)[:, None] & 1 != 0, b, 0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
    if bias is not None:
        sums += tl.load(bias + o, mask=o < out, other=0).to(ACC)[None, :]
    to = y + t.to(tl.int64)[:, None] * out + o[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=(t < T)[:, None] & (o < out)[None, :])


@triton.jit
def masked_dx(
    dy, w, bits, result, T, out, in_, words, ld_dy, ld_w,
    ACC: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(in_, WIDE)
    t = tl.program_id(0) // tiles * TOKENS + tl.arange(0, TOKENS)
    j = tl.program_id(0) % tiles * WIDE + tl.arange(0, WIDE)
    dy += (t % T).to(tl.int64)[:, None] * ld_dy
    sums = tl.zeros([TOKENS, WIDE], ACC)
    for k in range(0, out, DEPTH):
        o = k + tl.arange(0, DEPTH)
        inside = (o < out)[:, None] & (j < in_)[None, :]
        a = tl.load(dy + o[None, :], mask=(o < out)[None, :], other=0)
        b = tl.load(w + o.to(tl.int64)[:, None] * ld_w + j[None, :], mask=inside, other=0)
        b = keep(b, bits, o[:, None], j[None, :], inside, words)
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
    to = result + t.to(tl.int64)[:, None] * in_ + j[None, :]
    tl.store(to, sums.to(result.dtype.element_ty), mask=(t < T)[:, None] & (j < in_)[None, :])


@triton.jit
def masked_dw(
    dy, x, bits, result, T, out, in_, words, ld_dy, ld_x,
    ACC: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(in_, WIDE)
    o = tl.program_id(0) // tiles * HIGH + tl.arange(0, HIGH)
    j = tl.program_id(0) % tiles * WIDE + tl.arange(0, WIDE)
    sums = tl.zeros([HIGH, WIDE], ACC)
    for k in range(0, T, DEPTH):
        t = k + tl.arange(0, DEPTH)
        a = tl.load(
            dy + t.to(tl.int64)[None, :] * ld_dy + o[:, None], mask=(t < T)[None, :] & (o < out)[:, None], other=0
        )
        b = tl.load(
            x + t.to(tl.int64)[:, None] * ld_x + j[None, :], mask=(t < T)[:, None] & (j < in_)[None, :], other=0
        )
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
    inside = (o < out)[:, None] & (j < in_)[None, :]
    sums = keep(sums, bits, o[:, None], j[None, :], inside, words)
    tl.store(result + o.to(tl.int64)[:, None] * in_ + j[None, :], sums.to(result.dtype.element_ty), mask=inside)
