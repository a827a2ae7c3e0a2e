"""The products of sparse linear layers: every backend that runs on the CPU against the float64 reference."""

from __future__ import annotations

import itertools

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from sparse_layers import BACKENDS, BLOCKS, expected, layer, random_mask

from pycse.ops import sparse as ops
from pycse.pattern import pack_mask
from pycse.sparse import masked_linear

# Rounding of the stored result (and for 16 bits of what the same product in plain PyTorch is off by chance).
BAND = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TENSORS = ("y", "dx", "dw", "db")


def tensors(T, out, in_, dtype, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed + 1)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return new(T, in_), new(out, in_), new(out) if bias else None, new(T, out)


def products(x, weight, bias, dy, forward):
    """y and the gradients of x, weight and bias, in float64."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = forward(*leaves)
    y.backward(dy)
    return [None if t is None else t.double() for t in (y.detach(), *(None if t is None else t.grad for t in leaves))]


def check(T, out, in_, block, density, dtype, backend, bias=True, masked=False):
    """Values are those of ``dtype``; the budget is twice the error of plain PyTorch in it, plus a band."""
    mask = random_mask(out, in_, block, density)
    given = tensors(T, out, in_, dtype, bias=bias)
    exact = [None if t is None else t.double() for t in given]
    which = (pack_mask(mask),) if masked else (*ops.pattern_of(mask, block).tensors, block)
    op = ops.masked_linear if masked else ops.sparse_linear
    truth = products(*exact, lambda x, w, b: op(x, w, b, *which, "reference"))
    wide = torch.float32 if dtype == torch.float16 else dtype
    eager = products(
        *(None if t is None else t.to(wide) for t in given), lambda x, w, b: F.linear(x, w.masked_fill(~mask, 0), b)
    )
    ours = products(*given, lambda x, w, b: op(x, w, b, *which, backend))
    for name, t, e, o in zip(TENSORS, truth, eager, ours):
        if t is None:
            continue
        assert o.shape == t.shape and torch.isfinite(o).all()
        scale = t.norm().clamp_min(1e-30)
        off, allowed = (o - t).norm() / scale, 2 * (e - t).norm() / scale + BAND[dtype]
        assert t.numel() == 0 or off <= allowed, f"{name}: off by {off:.1e}, allowed {allowed:.1e}"
    assert (ours[2][~mask] == 0).all()


SIZES = [(1, 64, 128), (2, 128, 64), (11, 64, 64), (12, 192, 64), (13, 64, 192), (97, 128, 128), (257, 192, 128)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("T, out, in_", SIZES)
def test_sizes(T, out, in_, block, backend):
    check(T, out, in_, block, 0.3, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(BAND), ids=str)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", [0, 1e-3, 0.3, 1])
def test_densities(density, block, dtype, backend):
    for T in (53, 150):  # one panel of single weights' tokens, and several
        check(T, 128, 192, block, density, dtype, backend, bias=density != 0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "T, out, in_", [(1, 1, 1), (5, 3, 2), (17, 31, 97), (63, 101, 33), (65, 67, 300), (331, 13, 700)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_single_weights_at_ragged_sizes(T, out, in_, dtype, backend):
    for density in (0.05, 0.4, 1):
        check(T, out, in_, 1, density, dtype, backend)


@pytest.mark.parametrize("block", BLOCKS)
def test_several_panels_of_tokens(block):
    check(1100, 128, 1024, block, 0.2, torch.float32, "cpu")
    check(1100, 1024, 128, block, 0.2, torch.bfloat16, "cpu")


@pytest.mark.parametrize("block", BLOCKS)
def test_results_larger_than_the_caches(block):
    check(4128, 1024, 64, block, 0.1, torch.float32, "cpu")  # 17 MB, stored past them


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(BAND), ids=str)
@pytest.mark.parametrize("T, out, in_", [(1, 1, 1), (7, 33, 65), (64, 96, 31), (50, 128, 128)])
def test_bit_masks(T, out, in_, dtype, backend):
    for density in (0, 0.5, 1):
        check(T, out, in_, 1, density, dtype, backend, masked=True)


@instruction_sets.each
def test_every_instruction_set(isa, tmp_path):
    code = """
import torch
from test_sparse_kernels import BLOCKS, SIZES, check
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for T, out, in_ in SIZES:
        for block in BLOCKS: check(T, out, in_, block, 0.3, dtype, 'cpu')
    for T, out, in_ in ((17, 31, 97), (65, 67, 300)):
        check(T, out, in_, 1, 0.2, dtype, 'cpu')
        check(T, out, in_, 1, 0.2, dtype, 'cpu', masked=True)
for block in BLOCKS: check(4128, 1024, 64, block, 0.1, torch.float32, 'cpu')
for dtype in (torch.float32, torch.bfloat16):
    for T in (64, 301):
        for block in (32, 64): check(T, 256, 1536, block, 0.6, dtype, 'cpu'), check(T, 1536, 256, block, 0.6, dtype, 'cpu')
"""
    instruction_sets.run_with(isa, tmp_path, code)


def one_block(T, dtype=torch.float32, scale=1.0):
    """x (T, 64), a weight (64, 64) of whole blocks, and their product in float64."""
    x, weight, _, _ = tensors(T, 64, 64, torch.float32)
    x = (x * scale).to(dtype)
    which = (*ops.pattern_of(torch.ones(64, 64, dtype=torch.bool), 32).tensors, 32)
    return x, weight.to(dtype), which


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e35])
def test_blocks_of_small_and_large_numbers(scale):
    """As precise as float32 at any magnitude, and where magnitudes differ within a sum."""
    x, weight, which = one_block(300, scale=scale)
    x[:, ::3] *= 1e-3
    x[::2] *= 1e-2
    truth = x.double() @ weight.double().t()
    y = ops.sparse_linear(x, weight, None, *which, "cpu")
    eager = F.linear(x, weight)
    rows = truth.norm(dim=1)
    assert ((y - truth).norm(dim=1) / rows).max() <= 2 * ((eager - truth).norm(dim=1) / rows).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_blocks_keep_what_is_not_finite_in_its_row(bad, dtype):
    x, weight, which = one_block(300, dtype)
    x[7, 5] = bad
    y = ops.sparse_linear(x, weight, None, *which, "cpu")
    assert not y[7].isfinite().any()
    rest = torch.arange(300) != 7
    assert torch.equal(y[rest], ops.sparse_linear(x[rest].contiguous(), weight, None, *which, "cpu"))
    dy = torch.ones(300, 64, dtype=dtype)
    dy[7, 5] = bad
    leaf = weight.clone().requires_grad_()
    ops.sparse_linear(torch.ones(300, 64, dtype=dtype), leaf, None, *which, "cpu").backward(dy)
    assert not leaf.grad[5].isfinite().any() and leaf.grad[torch.arange(64) != 5].isfinite().all()


def test_blocks_of_one_owner_and_parts_of_columns():
    """A thread with one block over many tokens; empty block rows inside parts of a wide weight, and a ragged last
    tile."""
    for T, out, in_, kept in ((2100, 64, 64, [(1, 0)]), (2100, 64, 32, [(0, 0), (1, 0)])):
        mask = torch.zeros(out, in_, dtype=torch.bool)
        for r, c in kept:
            mask[r * 32 : r * 32 + 32, c * 32 : c * 32 + 32] = True
        x, weight, bias, dy = tensors(T, out, in_, torch.float32)
        leaf = weight.clone().requires_grad_()
        ops.sparse_linear(x, leaf, bias, *ops.pattern_of(mask, 32).tensors, 32, "cpu").backward(dy)
        truth = (dy.double().t() @ x.double()) * mask
        assert (leaf.grad - truth).norm() < 1e-5 * truth.norm()
    mask = torch.zeros(96, 8192, dtype=torch.bool)
    mask[:32], mask[64:], mask[32:64, :320] = True, True, True
    for m in (mask, mask.t().contiguous()):
        for T in (530, 1100):
            x, weight, bias, dy = (t.requires_grad_() for t in tensors(T, *m.shape, torch.float32))
            y = ops.sparse_linear(x, weight, bias, *ops.pattern_of(m, 32).tensors, 32, "cpu")
            y.backward(dy)
            w = weight.detach().double() * m
            for ours, truth in ((y, x.detach().double() @ w.t() + bias.detach()), (x.grad, dy.detach().double() @ w)):
                assert (ours - truth).norm() < 2e-6 * truth.norm()


def test_pytorch_keeps_its_own_tiles():
    """AMX registers are a thread's, and PyTorch configures them too."""
    x, weight, which = one_block(300, torch.bfloat16)
    before = F.linear(x, weight)
    for _ in range(3):
        ops.sparse_linear(x, weight, None, *which, "cpu")
        assert torch.equal(F.linear(x, weight), before)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("block", [1, 16])
def test_layouts(block, backend):
    dense, sparse = layer(block=block, backend=backend)
    x = torch.randn(96, 40)
    for given in (x.t(), x.t()[::2], torch.randn(4, 5, 96), torch.randn(3, 200)[:, 7:103], torch.randn(96)):
        torch.testing.assert_close(sparse(given), expected(dense, sparse.mask, given))
    given = torch.randn(1, 96).expand(9, 96).requires_grad_()
    y = sparse(given)
    torch.testing.assert_close(y, expected(dense, sparse.mask, given))
    (gradient,) = torch.autograd.grad(y.sum(), given)  # an expanded gradient, stride 0
    torch.testing.assert_close(gradient, (dense.weight * sparse.mask).sum(0).expand(9, 96))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("block", [1, 16])
def test_no_tokens(block, backend):
    _, sparse = layer(block=block, backend=backend)
    x = torch.randn(0, 96, requires_grad=True)
    y = sparse(x)
    assert y.shape == (0, 64)
    y.sum().backward()
    assert x.grad.shape == x.shape and (sparse.weight.grad == 0).all() and (sparse.bias.grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("block", [1, 16])
def test_which_gradients_are_needed(block, needs, backend):
    mask = random_mask(32, 48, block, 0.4)
    given = [t.requires_grad_(n) for t, n in zip(tensors(7, 32, 48, torch.float32)[:3], needs)]
    index = (*ops.pattern_of(mask, block).tensors, block)
    for y in (
        ops.sparse_linear(*given, *index, backend),
        masked_linear(given[0], given[1], mask, given[2], backend=backend),
    ):
        assert y.requires_grad == any(needs)
        if not any(needs):
            continue
        truth = F.linear(given[0], given[1] * mask, given[2])
        wanted = [t for t in given if t.requires_grad]
        for ours, eager in zip(
            torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(truth.sin().sum(), wanted)
        ):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("block", [1, 16])
def test_gradients_of_first_and_second_order(block, backend):
    mask = random_mask(32, 32, block, 0.5)
    index = (*ops.pattern_of(mask, block).tensors, block)
    given = [t.requires_grad_() for t in tensors(3, 32, 32, torch.float64)[:3]]
    for f in (
        lambda x, w, b: ops.sparse_linear(x, w, b, *index, backend),
        lambda x, w, b: masked_linear(x, w, mask, b, backend=backend),
    ):
        assert torch.autograd.gradcheck(f, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, given, fast_mode=True)


def test_values_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            for block in BLOCKS:
                mask = random_mask(128, 192, block, 0.3)
                given = tensors(301, 128, 192, torch.float32)
                index = (*ops.pattern_of(mask, block).tensors, block)
                results.append(products(*given, lambda x, w, b: ops.sparse_linear(x, w, b, *index, "cpu"))[:3])  # noqa: B023
    finally:
        torch.set_num_threads(threads)
    one = results[: len(BLOCKS)]
    for k, others in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(one[k % len(BLOCKS)], others))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [1, 16])
def test_what_is_not_finite(block, backend):
    """Inf and NaN pass through kept weights as in a dense layer, and not at all where a weight is removed."""
    dense, sparse = layer(block=block, backend=backend, dtype=torch.float64)
    x = torch.randn(5, 96, dtype=torch.float64)
    x[2, 90] = torch.inf
    x[3, 91] = torch.nan
    with torch.no_grad():
        y = sparse(x)
    clean = torch.isfinite(y)
    assert clean[[0, 1, 4]].all()
    if block > 1 or backend == "cpu":  # plain PyTorch multiplies single weights densely
        assert torch.equal(clean[2], ~sparse.mask[:, 90]) and torch.equal(clean[3], ~sparse.mask[:, 91])
    torch.testing.assert_close(
        y[clean], expected(dense, sparse.mask, x.nan_to_num(0, 0))[clean] if clean.all() else y[clean]
    )
    with torch.no_grad():
        sparse.weight[~sparse.mask] = torch.nan  # removed weights count as 0 whatever they hold
        assert torch.isfinite(sparse(torch.randn(3, 96, dtype=torch.float64))).all()


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, block, backend):
    x, weight, b, dy = tensors(5, 32, 48, torch.float32, bias=bias)
    mask = random_mask(32, 48, block, 0.4)
    index = (*ops.pattern_of(mask, block).tensors, block, backend)
    for which, op in ((index, ops.sparse_linear), ((pack_mask(mask), backend), ops.masked_linear)):
        grad = lambda t: None if t is None else t.detach().clone().requires_grad_()  # noqa: E731
        torch.library.opcheck(op.y.op, (grad(x), grad(weight), grad(b), *which))
        torch.library.opcheck(op.dx.op, (grad(dy), grad(weight), *which))
        torch.library.opcheck(op.dw.op, (grad(dy), grad(x), *which))
