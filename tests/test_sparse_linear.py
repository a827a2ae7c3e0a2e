"""Sparse linear layers: every backend that runs on the CPU against the float64 reference, and SparseLinear as a module."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from pycse.kernels import native
from torch import nn

from pycse.ops import sparse as ops
from pycse.sparse import SparseLinear, masked_linear
from pycse.sparse.pattern import Pattern, break_even, choose, pack_mask, unpack_mask

BACKENDS = ["torch", "cpu"]
BLOCKS = [1, 16, 32, 64]
NAMES = {1: "unstructured", 16: "block16", 32: "block32", 64: "block64"}
# Rounding of the stored result (and for 16 bits of what the same product in plain PyTorch is off by chance).
BAND = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TENSORS = ("y", "dx", "dw", "db")


def random_mask(out, in_, block, density, seed=0):
    """Whole blocks, about ``density`` of them, with an empty block row and an empty block column unless all are kept."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(out // block, in_ // block, generator=g) < density
    if 0 < density < 1:
        kept[-1], kept[:, 0] = False, False
        kept[0, -1] = True
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)


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
    which = (pack_mask(mask),) if masked else (*Pattern.from_mask(mask, block).tensors, block)
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


@pytest.mark.parametrize("isa", ["portable", "v3", "v4", "amx"])
def test_every_instruction_set(isa, tmp_path):
    from pycse.kernels import native

    if isa not in native().cpu_instruction_sets():
        pytest.skip(f"this processor runs {', '.join(native().cpu_instruction_sets())}, not {isa}")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "from test_sparse_linear import BLOCKS, SIZES, check\n"
        "from pycse.kernels import native\n"
        "assert native().cpu_isa() == sys.argv[2]\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "    for T, out, in_ in SIZES:\n"
        "        for block in BLOCKS: check(T, out, in_, block, 0.3, dtype, 'cpu')\n"
        "    for T, out, in_ in ((17, 31, 97), (65, 67, 300)):\n"
        "        check(T, out, in_, 1, 0.2, dtype, 'cpu')\n"
        "        check(T, out, in_, 1, 0.2, dtype, 'cpu', masked=True)\n"
        "for block in BLOCKS: check(4128, 1024, 64, block, 0.1, torch.float32, 'cpu')\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for T in (64, 301):\n"
        "        for block in (32, 64): check(T, 256, 1536, block, 0.6, dtype, 'cpu'), check(T, 1536, 256, block, 0.6, dtype, 'cpu')\n"
        "print('checked')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), isa],
        env={**os.environ, "PYCSE_CPU_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "checked" in done.stdout


def one_block(T, dtype=torch.float32, scale=1.0):
    """x (T, 64), a weight (64, 64) of whole blocks, and their product in float64."""
    x, weight, _, _ = tensors(T, 64, 64, torch.float32)
    x = (x * scale).to(dtype)
    which = (*Pattern.from_mask(torch.ones(64, 64, dtype=torch.bool), 32).tensors, 32)
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
    """A thread with one block over many tokens; empty block rows inside parts of a wide weight, and a ragged last tile."""
    for T, out, in_, kept in ((2100, 64, 64, [(1, 0)]), (2100, 64, 32, [(0, 0), (1, 0)])):
        mask = torch.zeros(out, in_, dtype=torch.bool)
        for r, c in kept:
            mask[r * 32 : r * 32 + 32, c * 32 : c * 32 + 32] = True
        x, weight, bias, dy = tensors(T, out, in_, torch.float32)
        leaf = weight.clone().requires_grad_()
        ops.sparse_linear(x, leaf, bias, *Pattern.from_mask(mask, 32).tensors, 32, "cpu").backward(dy)
        truth = (dy.double().t() @ x.double()) * mask
        assert (leaf.grad - truth).norm() < 1e-5 * truth.norm()
    mask = torch.zeros(96, 8192, dtype=torch.bool)
    mask[:32], mask[64:], mask[32:64, :320] = True, True, True
    for m in (mask, mask.t().contiguous()):
        for T in (530, 1100):
            x, weight, bias, dy = (t.requires_grad_() for t in tensors(T, *m.shape, torch.float32))
            y = ops.sparse_linear(x, weight, bias, *Pattern.from_mask(m, 32).tensors, 32, "cpu")
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


def layer(out=64, in_=96, block=16, density=0.3, backend="auto", dtype=torch.float32, pattern=None, bias=True):
    torch.manual_seed(0)
    dense = torch.nn.Linear(in_, out, bias=bias, dtype=dtype)
    mask = random_mask(out, in_, block, density)
    return dense, SparseLinear.from_dense(dense, mask, pattern or NAMES[block], backend)


def expected(dense, mask, x):
    return F.linear(x, dense.weight * mask, dense.bias)


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
    index = (*Pattern.from_mask(mask, block).tensors, block)
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
    index = (*Pattern.from_mask(mask, block).tensors, block)
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
                index = (*Pattern.from_mask(mask, block).tensors, block)
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
    index = (*Pattern.from_mask(mask, block).tensors, block, backend)
    for which, op in ((index, ops.sparse_linear), ((pack_mask(mask), backend), ops.masked_linear)):
        grad = lambda t: None if t is None else t.detach().clone().requires_grad_()  # noqa: E731
        torch.library.opcheck(op.op, (grad(x), grad(weight), grad(b), *which))
        torch.library.opcheck(op.dx, (grad(dy), grad(weight), *which))
        torch.library.opcheck(op.dw, (grad(dy), grad(x), *which))


@pytest.mark.clean_memory
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_compile_full_graph(pattern, dynamic):
    torch._dynamo.reset()
    _, sparse = layer(pattern=pattern)
    traced = torch.compile(copy.deepcopy(sparse), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (9, 4, 5):
        results = []
        for module in (sparse, traced):
            x = torch.linspace(-1, 1, T * 96).view(T, 96).requires_grad_()
            module.weight.grad = None
            y = module(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, module.weight.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_autocast(pattern):
    dense, sparse = layer(pattern=pattern)
    x = torch.randn(9, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, truth = sparse(x), expected(dense, sparse.mask, x)
        y2 = masked_linear(x, dense.weight, sparse.mask, dense.bias)
    assert y.dtype == y2.dtype == torch.bfloat16
    torch.testing.assert_close(y, truth, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y2, truth, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == sparse.weight.grad.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == torch.bfloat16


# The module


@pytest.mark.parametrize("pattern", ["auto", "unstructured", "block16", "dense"])
def test_training_keeps_zeros(pattern):
    dense, sparse = layer(pattern=pattern)
    before = sparse.weight.detach().clone()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(torch.randn(7, 96)).square().sum().backward()
        assert (sparse.weight.grad[~sparse.mask] == 0).all() and (sparse.weight.grad[sparse.mask] != 0).any()
        optimizer.step()
    assert (sparse.weight[~sparse.mask] == 0).all()
    assert (sparse.weight[sparse.mask] != before[sparse.mask]).any()
    assert (dense.weight[~sparse.mask] != 0).any()  # the original is as it was
    x = torch.randn(5, 96)
    with torch.no_grad():
        torch.testing.assert_close(sparse.eval()(x), F.linear(x, sparse.weight, sparse.bias))
        plain = sparse.densify()
        assert type(plain) is torch.nn.Linear and not plain.training
        torch.testing.assert_close(plain(x), sparse(x))


def test_from_dense_copies():
    dense, _ = layer(dtype=torch.float64)
    dense.weight.requires_grad_(False)
    dense.eval()
    sparse = SparseLinear.from_dense(dense, random_mask(64, 96, 16, 0.5))
    assert not sparse.training and not sparse.weight.requires_grad and sparse.bias.requires_grad
    assert sparse.weight.dtype == torch.float64 and sparse.weight.data_ptr() != dense.weight.data_ptr()
    assert isinstance(sparse, torch.nn.Linear) and list(sparse.state_dict()) == ["weight", "bias", "mask_bits"]
    back = sparse.densify()
    assert not back.weight.requires_grad and torch.equal(back.weight, dense.weight * sparse.mask)


@pytest.mark.parametrize("pattern", ["auto", "unstructured", "block16"])
def test_state_dict_with_another_mask(pattern):
    _, sparse = layer(pattern=pattern)
    _, other = layer(density=0.8, pattern=pattern)
    x = torch.randn(5, 96)
    for assign in (False, True):
        target = copy.deepcopy(sparse)
        target(x)
        target.load_state_dict(other.state_dict(), assign=assign)
        torch.testing.assert_close(target(x), other(x))
        assert target.chosen == other.chosen and torch.equal(target.mask, other.mask)
        assert (target.weight[~target.mask] == 0).all()
    fresh = SparseLinear(96, 64, pattern=pattern)
    fresh.load_state_dict(other.state_dict())
    torch.testing.assert_close(fresh(x), other(x))
    with torch.device("meta"):
        hollow = SparseLinear(96, 64, pattern=pattern)
    hollow.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(hollow(x), other(x))


def test_state_dict_that_does_not_fit():
    _, sparse = layer(pattern="block16")
    before = {name: t.clone() for name, t in sparse.state_dict().items()}
    for bits, words in (
        (pack_mask(random_mask(64, 96, 1, 0.5)), "whole 16 x 16 blocks"),
        (torch.ones(64, 96), r"mask_bits must be an int32 tensor of shape \(64, 3\), got a torch.float32"),
        (pack_mask(random_mask(64, 128, 16, 0.5)), r"mask_bits must be bits of shape \(64, 3\) .* got \(64, 4\)"),
    ):
        with pytest.raises(RuntimeError, match=words):
            sparse.load_state_dict({**before, "weight": torch.zeros(64, 96), "mask_bits": bits})
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        sparse.load_state_dict({"weight": before["weight"]})
    assert all(torch.equal(before[name], t) for name, t in sparse.state_dict().items())


def test_state_dict_of_a_dense_layer():
    dense, sparse = layer()
    sparse.load_state_dict(dense.state_dict())  # the mask stays
    assert torch.equal(sparse.weight, dense.weight * sparse.mask) and sparse.density < 0.5


def test_a_mask_changed_in_place_is_seen():
    dense, sparse = layer(block=1)
    x = torch.randn(5, 96)
    sparse(x)
    sparse.mask[:32] = False
    torch.testing.assert_close(sparse(x), expected(dense, sparse.mask, x))
    assert (sparse.weight[:32] == 0).all()
    sparse.mask = random_mask(64, 96, 1, 0.1, seed=9)
    torch.testing.assert_close(sparse(x), F.linear(x, sparse.weight * sparse.mask, sparse.bias))
    sparse.mask = torch.ones(64, 96)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        sparse(x)


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_momentum_of_what_is_removed_later(pattern):
    """The optimizer goes on moving a weight that had momentum before its mask fell."""
    _, sparse = layer(pattern=pattern, density=1)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    x = torch.randn(5, 96)
    for step in range(3):
        sparse(x).square().sum().backward()
        optimizer.step()
        if step == 0:
            sparse.mask[:32] = False
    assert sparse.weight[:32].any()
    torch.testing.assert_close(sparse(x), expected(sparse, sparse.mask, x))
    for loaded in (sparse.state_dict()["weight"], sparse.densify().weight):
        assert not loaded[:32].any() and loaded[32:].all()


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_merged_adapters(pattern):
    _, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    sparse(x)
    sparse.weight.data += 1
    assert not copy.deepcopy(sparse).state_dict()["weight"][~sparse.mask].any()
    sparse.eval()
    torch.testing.assert_close(sparse(x), expected(sparse, sparse.mask, x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_activation_checkpointing(pattern, reentrant):
    _, sparse = layer(pattern=pattern)
    results = []
    for call in (sparse, lambda x: torch.utils.checkpoint.checkpoint(sparse, x, use_reentrant=reentrant)):
        x = torch.linspace(-1, 1, 5 * 96).view(5, 96).requires_grad_()
        sparse.zero_grad()
        call(x.sin()).square().sum().backward()
        results.append((x.grad, sparse.weight.grad, sparse.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("pattern", ["auto", "unstructured", "block16", "dense"])
def test_weights_of_others(pattern):
    """Tensors in the place of the weight are masked, and are not written to."""
    _, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    given = {name: torch.randn_like(p, requires_grad=True) for name, p in sparse.named_parameters()}
    before = {name: t.detach().clone() for name, t in given.items()}
    y = torch.func.functional_call(sparse, given, (x,))
    torch.testing.assert_close(y, F.linear(x, before["weight"] * sparse.mask, before["bias"]))
    y.square().sum().backward()
    assert all(torch.equal(before[name], t) for name, t in given.items())
    assert not given["weight"].grad[~sparse.mask].any() and given["weight"].grad[sparse.mask].any()
    if sparse.chosen == "dense":
        loss = lambda w: torch.func.functional_call(sparse, w, (x,)).square().sum()  # noqa: E731
        torch.testing.assert_close(torch.func.grad(loss)(before)["weight"], given["weight"].grad)
        each = torch.func.vmap(torch.func.grad(lambda x: sparse(x).square().sum()))(x)
        x.requires_grad_()
        torch.testing.assert_close(each, torch.autograd.grad(sparse(x).square().sum(), x)[0])


def test_two_forwards_before_a_backward():
    _, sparse = layer(pattern="dense")
    x = torch.randn(5, 96)
    first = sparse(x.requires_grad_())
    sparse.mask = sparse.mask.clone()
    (first.sum() + sparse(x).sum()).backward()
    assert not sparse.weight.grad[~sparse.mask].any()


@pytest.mark.parametrize("pattern", ["auto", "unstructured", "block16", "dense"])
def test_casts_and_empty_storage(pattern):
    dense, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    wide = copy.deepcopy(sparse).type(torch.float64)  # casts buffers as well
    torch.testing.assert_close(wide(x.double()).float(), expected(dense, sparse.mask, x))
    with torch.device("meta"):
        hollow = SparseLinear(96, 64, pattern=pattern)
    hollow.to_empty(device="cpu").load_state_dict(sparse.state_dict())
    torch.testing.assert_close(hollow(x), sparse(x))
    assert hollow.chosen == sparse.chosen


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_copies(pattern, tmp_path):
    _, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    y = sparse(x)
    torch.save(sparse, tmp_path / "layer.pt")
    for other in (
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(tmp_path / "layer.pt", weights_only=False),
    ):
        torch.testing.assert_close(other(x), y)
        assert other.chosen == sparse.chosen and other.mask.dtype == torch.bool
        with torch.no_grad():
            other.weight.zero_()
    torch.testing.assert_close(sparse(x), y)


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_to(pattern):
    dense, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)):
        moved = copy.deepcopy(sparse).to(dtype)
        assert moved.mask.dtype == torch.bool and moved.weight.dtype == dtype
        y = moved(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected(dense, sparse.mask, x), rtol=tolerance, atol=tolerance)
    hollow = copy.deepcopy(sparse).to("meta")
    assert hollow.mask.is_meta and "dense" in repr(hollow)


def test_repr_says_pattern_density_and_why_dense():
    assert "pattern=block16, density=100.0%" in repr(SparseLinear(32, 16, pattern="block16"))
    text = repr(SparseLinear(33, 17))
    assert "pattern=dense, density=100.0% (dense: density 100.0%; for cpu float32 sparse pays below" in text
    assert "out_features must be a multiple of the block 16, got 17" in text
    assert "backend=torch" in repr(SparseLinear(33, 17, backend="torch"))


@pytest.mark.parametrize("block", BLOCKS)
def test_choice(block):
    limit = break_even("cpu", torch.float32)[NAMES[block]]
    sides = 640 // block
    kept = torch.zeros(sides * sides, dtype=torch.bool)
    kept[
        torch.randperm(sides * sides, generator=torch.Generator().manual_seed(0))[: int(limit * sides * sides * 0.9)]
    ] = True
    mask = kept.view(sides, sides).repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert choose(mask, torch.float32, "cpu").pattern == NAMES[block]
    choice = choose(torch.ones(640, 640, dtype=torch.bool), torch.float32, "cpu")
    assert choice.pattern == "dense" and "sparse pays below" in choice.reason
    assert choose(mask, torch.float32, "mps").pattern == "dense"
    thin = choose(torch.ones(48, 48, dtype=torch.bool), torch.float32, "cpu")  # only blocks of 16 fit
    assert thin.reason.endswith(f"below a density of {break_even('cpu', torch.float32)['block16']:.0%}")


@pytest.mark.parametrize("block", BLOCKS)
def test_patterns_are_lists_by_rows_and_by_columns(block):
    mask = random_mask(192, 128, block, 0.4)
    p = Pattern.from_mask(mask, block)
    assert torch.equal(p.mask(), mask) and p.density == pytest.approx(mask.float().mean().item())
    t = Pattern.from_mask(mask.t(), block)
    assert torch.equal(p.t_ptr, t.ptr) and torch.equal(p.t_rows, t.cols)
    assert all(i.dtype == torch.int32 for i in p.tensors)
    assert torch.equal(p.t_plan, t.plan) or block == 1  # which differ in where a weight stands in the list by rows
    assert (p.plan.numel() == 0) == (block > 1)


@pytest.mark.parametrize(
    "out, in_, density", [(5, 300, 0.3), (200, 128, 0.1), (64, 7, 1), (9, 129, 0), (3, 0, 1), (0, 4, 1)]
)
def test_plans_use_every_kept_weight_once(out, in_, density):
    mask = random_mask(out, in_, 1, density)
    p = Pattern.from_mask(mask)
    rows = torch.arange(out).repeat_interleave(p.ptr.long().diff())
    for plan, results, features, transposed in ((p.plan, out, in_, False), (p.t_plan, in_, out, True)):
        chunk, step = native().SPARSE_CHUNK, native().SPARSE_AT_STEP
        chunks = max(1, -(-features // chunk))
        lengths, order, source, at = plan.split(
            [chunks * (chunk + 1), chunks * results, p.nnz, -(-p.nnz // 2)]  # 16-bit places, two in each
        )
        place, used = at.view(torch.int16)[: p.nnz].long() // step, []
        for q, (many, of) in enumerate(zip(lengths.view(chunks, -1), order.view(chunks, results))):
            assert sorted(of.tolist()) == list(range(results)) and many.sum() == results
            counts = torch.arange(chunk + 1).repeat_interleave(many.long())
            used += [torch.stack([of.long().repeat_interleave(counts), torch.full((int(counts.sum()),), q * chunk)])]
        result, begin = torch.cat(used, 1)
        feature, source = begin + place, source.long()
        row, column = (feature, result) if transposed else (result, feature)
        assert torch.equal(row, rows[source]) and torch.equal(column, p.cols[source].long())
        assert torch.equal(source.sort().values, torch.arange(p.nnz))


def fixed_layer(**options):
    torch.manual_seed(0)
    layer = SparseLinear.from_dense(nn.Linear(200, 96), random_mask(96, 200, 1, 0.3), "unstructured", **options)
    return layer.eval(), torch.randn(150, 200)


def changed_values(layer):
    """Ways in which a weight changes, as (name, change)."""
    optimizer = torch.optim.SGD([layer.weight], 0.1)

    def step():
        with torch.enable_grad():
            layer(torch.randn(150, 200)).square().mean().backward()
        optimizer.step()

    def reload():
        layer.load_state_dict(SparseLinear.from_dense(nn.Linear(200, 96), layer.mask).state_dict())

    return [
        ("step", step),
        ("add", lambda: layer.weight.add_(1)),
        ("data written", lambda: layer.weight.data.mul_(2)),
        ("data replaced", lambda: setattr(layer.weight, "data", torch.randn(96, 200))),
        ("parameter replaced", lambda: setattr(layer, "weight", nn.Parameter(torch.randn(96, 200)))),
        ("state_dict", reload),
        ("mask", lambda: layer.mask.copy_(random_mask(96, 200, 1, 0.2))),
        ("columns", lambda: setattr(layer.weight, "data", torch.randn(200, 96).t())),
    ]


@torch.no_grad()
def test_weights_that_stay_are_packed_once_and_again_when_they_change():
    layer, x = fixed_layer()
    layer.train()
    before = layer(x)
    assert layer._made is None
    assert torch.equal(layer.eval()(x), before) and layer._made is not None
    packed = layer._made[1].packed
    assert packed.shape == (layer.mask.sum(),) and torch.equal(layer(x), before) and layer._made[1].packed is packed
    for name, change in changed_values(layer):
        change()
        expected = F.linear(x, layer.weight.masked_fill(~layer.mask, 0), layer.bias)
        torch.testing.assert_close(layer(x), expected, msg=lambda m, name=name: f"{name}: {m}")
    layer.weight.data[0, layer.mask[0].nonzero()[0]] = 100  # one weight, which may go unnoticed until then
    expected = F.linear(x, layer.weight.masked_fill(~layer.mask, 0), layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_packed_weights_are_for_plain_inference():
    layer, x = fixed_layer()
    layer(x).sum().backward()
    assert layer._made is None and layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        exact = layer(x)
        torch.testing.assert_close(
            torch.func.functional_call(layer, {"weight": 2 * layer.weight}, x), 2 * exact - layer.bias
        )
        assert torch.equal(copy.deepcopy(layer)(x), exact) and copy.deepcopy(layer)._made is None
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            other = copy.deepcopy(layer).to(dtype)
            torch.testing.assert_close(other(x.to(dtype)).float(), exact, atol=0.05, rtol=0.05)
            assert other._made[1].packed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for backend in ("torch", "reference"):
            plain, _ = fixed_layer(backend=backend)
            torch.testing.assert_close(plain(x), exact)
            assert plain._made[1].packed is None
        blocks = SparseLinear.from_dense(nn.Linear(64, 64), torch.ones(64, 64, dtype=torch.bool), "block32").eval()
        blocks(torch.randn(70, 64))
        assert blocks._made is None
    with torch.inference_mode():
        assert torch.equal(layer(x), exact)
        made_here = SparseLinear.from_dense(nn.Linear(200, 96), layer.mask, "unstructured").eval()
        made_here.weight.copy_(layer.weight), made_here.bias.copy_(layer.bias)
        assert torch.equal(made_here(x), exact)
        made_here.weight.mul_(3)
        torch.testing.assert_close(made_here(x), 3 * exact - 2 * layer.bias)


@pytest.mark.parametrize("in_", [0, 1, 31, 32, 33, 64, 100])
def test_packed_masks(in_):
    mask = random_mask(5, in_, 1, 0.5 if in_ else 1)
    bits = pack_mask(mask)
    assert bits.dtype == torch.int32 and bits.shape == (5, -(-in_ // 32))
    assert torch.equal(unpack_mask(bits, in_), mask)
    for row, column in ((0, 0), (4, in_ - 1)) if in_ else ():
        assert bool(bits[row, column // 32].item() >> column % 32 & 1) == mask[row, column]
    wide = torch.zeros(5, in_ + 3, dtype=torch.bool)  # rows that begin anywhere
    wide[:, 3:] = mask
    assert torch.equal(pack_mask(wide[:, 3:]), bits)


def test_a_changed_mask_is_another_mask():
    """Nothing of a mask is kept between calls, so that no way of writing to it goes unnoticed."""
    x, weight = torch.randn(4, 40), torch.randn(16, 40)
    mask = torch.ones(16, 40, dtype=torch.bool)

    def check():
        torch.testing.assert_close(masked_linear(x, weight, mask), F.linear(x, weight * mask))

    check()
    mask[3] = False
    check()
    mask.data[5:9, ::2] = False
    check()
    mask.numpy()[:, 1] = False
    check()
    with torch.inference_mode():
        mask[10] = False
        check()


def test_a_mask_takes_a_bit_a_weight():
    _, sparse = layer(256, 96)
    state = sparse.state_dict()
    assert state["mask_bits"].nbytes * 8 == 256 * 96 and torch.equal(unpack_mask(state["mask_bits"], 96), sparse.mask)


x96, w96, m96 = torch.randn(4, 96), torch.randn(64, 96), torch.ones(64, 96, dtype=torch.bool)
BAD = [
    (lambda: masked_linear(x96, w96, m96[:, 1:]), ValueError, r"mask must have the weight's shape \(64, 96\), got \(64, 95\)"),
    (lambda: masked_linear(x96, w96, m96.float()), TypeError, r"mask must be a bool tensor .* got a torch.float32"),
    (lambda: masked_linear(x96, w96, [True]), TypeError, r"mask must be a bool tensor"),
    (lambda: masked_linear(x96, w96, pack_mask(m96)[:, :2]), ValueError, r"bits of shape \(64, 3\).* got \(64, 2\)"),
    (lambda: masked_linear(x96, w96, m96.to("meta")), ValueError, r"mask must be on the weight's device cpu, got meta"),
    (lambda: masked_linear(x96[:, 1:], w96, m96), ValueError, r"x must have the weight's 96 features last, got .*95"),
    (lambda: masked_linear(x96.double(), w96, m96), TypeError, r"weight must have x's dtype torch.float64"),
    (lambda: masked_linear(x96, w96, m96, torch.randn(63)), ValueError, r"bias must have shape \(64,\), got \(63,\)"),
    (lambda: masked_linear(x96, w96, m96, torch.randn(64).double()), TypeError, r"bias must have x's dtype"),
    (lambda: masked_linear(x96.long(), w96, m96), TypeError, r"x must be float32.* got torch.int64"),
    (lambda: masked_linear(x96.to_sparse(), w96, m96), TypeError, r"x must be a dense tensor, got torch.sparse_coo"),
    (lambda: masked_linear(x96, w96[0], m96[0]), ValueError, r"weight must have 2 dimensions"),
    (lambda: masked_linear(x96, w96, m96, backend="mkl"), ValueError, r"backend must be one of .* got 'mkl'"),
    (lambda: masked_linear(x96, w96, m96, backend="cuda"), RuntimeError, r"backend='cuda' cannot run here"),
    (lambda: SparseLinear(96, 64, mask=m96.t()), ValueError, r"mask must have the weight's shape"),
    (lambda: SparseLinear(96, 64, pattern="block8"), ValueError, r"pattern must be one of .* got 'block8'"),
    (lambda: SparseLinear(96, 64, backend="fast"), ValueError, r"backend must be one of"),
    (lambda: SparseLinear(96, 72, pattern="block16"), ValueError, r"out_features must be a multiple of the block 16, got 72"),
    (lambda: SparseLinear(96, 64, pattern="block64"), ValueError, r"in_features must be a multiple of the block 64, got 96"),
    (lambda: SparseLinear(96, 64, mask=random_mask(64, 96, 1, 0.5), pattern="block32"), ValueError, r"whole 32 x 32 blocks .* \(64, 96\)"),
    (lambda: SparseLinear(96, 64, pattern="2:4"), ValueError, r"pattern '2:4' cannot be used: 2:4 runs on NVIDIA GPUs"),
    (lambda: SparseLinear.from_dense(torch.nn.Conv1d(1, 1, 1), m96), TypeError, r"linear must be a torch.nn.Linear, got Conv1d"),
    (lambda: SparseLinear.from_dense(torch.nn.Linear(96, 64), None), TypeError, r"mask must be a bool tensor"),
    (lambda: SparseLinear(96, 64)(torch.randn(3, 64)), ValueError, r"x must have the weight's 96 features last"),
    (lambda: SparseLinear(96, 64)(x96.bfloat16()), TypeError, r"weight must have x's dtype torch.bfloat16"),
    (lambda: Pattern.from_mask(m96, 8), ValueError, r"block must be 1, 16, 32 or 64, got 8"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_unlike_devices():
    with pytest.raises(ValueError, match="weight must be on x's device cpu, got meta"):
        masked_linear(x96, w96.to("meta"), m96.to("meta"))
