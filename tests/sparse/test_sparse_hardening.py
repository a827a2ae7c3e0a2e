"""Sparse layers given tensors whose memory does not hold their values, odd layouts, and several threads at once."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import NAMES, layer, random_mask
from torch import nn
from torch.func import functional_call

from pycse.ops import sparse as ops
from pycse.pattern import pack_mask
from pycse.sparse import SparseLinear, masked_linear

PATTERNS = ["unstructured", "block16", "block32", "dense"]
BACKENDS = ["cpu", "torch", "reference"]
SIDES = {name: side for side, name in NAMES.items()}


def plain(t):
    """What a tensor means, in memory of its own."""
    return torch.zeros(t.shape, dtype=t.dtype) + t


def lazy(*shape, dtype=torch.float32):
    """Tensors that PyTorch resolves later: the conjugate's imaginary part, a negative view, a zero without memory."""
    g = torch.Generator().manual_seed(0)
    new = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    yield torch._neg_view(new)
    yield torch._efficientzerotensor(shape, dtype=dtype)
    if dtype in (torch.float32, torch.float64):
        part = torch.randn(*shape, dtype=torch.complex64 if dtype == torch.float32 else torch.complex128).conj().imag
        assert part.is_neg()
        yield part


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tensors_that_are_resolved_later(pattern, backend):
    _, sparse = layer(32, 64, SIDES.get(pattern, 1), 0.4, backend, pattern=pattern)
    mask, x = sparse.mask, torch.randn(5, 64)
    weight, bias = sparse.weight.detach().clone(), sparse.bias.detach().clone()

    def check(x, weight, bias, dy):
        leaves = [plain(t).requires_grad_() for t in (x, weight, bias)]
        truth = F.linear(leaves[0], leaves[1] * mask, leaves[2])
        gradients = torch.autograd.grad(truth, leaves, plain(dy))
        for call in (
            lambda x, w, b: functional_call(sparse, {"weight": w, "bias": b}, (x,)),
            lambda x, w, b: masked_linear(x, w, mask, b, backend=backend),
        ):
            for training in (True, False):
                sparse.train(training)
                with torch.no_grad():
                    torch.testing.assert_close(call(x, weight, bias), truth)
                    torch.testing.assert_close(call(x, nn.Parameter(weight), nn.Parameter(bias)), truth)
                given = [t.detach().requires_grad_() for t in (x, weight, bias)]
                y = call(*given)
                torch.testing.assert_close(y, truth)
                torch.testing.assert_close(torch.autograd.grad(y, given, dy), gradients)

    dy = torch.randn(5, 32)
    for t in lazy(5, 64):
        check(t, weight, bias, dy)
    for t in lazy(32, 64):
        check(x, t, bias, dy)
    for t in lazy(32):
        check(x, weight, t, dy)
    for t in lazy(5, 32):
        check(x, weight, bias, t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_what_is_resolved_later(backend, dtype):
    mask = random_mask(32, 64, 16, 0.5)
    for op, which in (
        (ops.sparse_linear, (*ops.pattern_of(mask, 16).tensors, 16)),
        (ops.sparse_linear, (*ops.pattern_of(mask).tensors, 1)),
        (ops.masked_linear, (pack_mask(mask),)),
    ):
        for product, left, right in ((op.y, (5, 64), (32, 64)), (op.dx, (5, 32), (32, 64)), (op.dw, (5, 32), (5, 64))):
            rest = (None, *which, backend) if product is op.y else (*which, backend)
            for a in lazy(*left, dtype=dtype):
                for b in lazy(*right, dtype=dtype):
                    torch.testing.assert_close(product(a, b, *rest), product.op(plain(a), plain(b), *rest))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layouts(pattern, backend):
    """Strides of 0, of other orders, and as long as a tensor of a terabyte has them; one row, none, and no rows at
    all."""
    _, sparse = layer(32, 64, SIDES.get(pattern, 1), 0.4, backend, pattern=pattern)
    base = torch.randn(200, 200)
    far = torch.as_strided(base, (1, 64), (1 << 38, 1))
    for x in (
        base[:64, :5].t(), base[::7, 3:131:2], base[:1, :64].expand(6, 64), base[:6, :1].expand(6, 64), base[0, 0].expand(3, 64),
        far, base[:0, :64], base[0, :64], base[:12, :64].view(2, 3, 2, 64).transpose(0, 2), base[:12, :64].view(3, 4, 64)[:, :0],
    ):  # fmt: skip
        for dy in (None, torch.randn(1).expand(*x.shape[:-1], 32), torch.randn(32).expand(*x.shape[:-1], 32)):
            given, truth = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
            ours, wanted = sparse(given), F.linear(truth, sparse.weight * sparse.mask, sparse.bias)
            torch.testing.assert_close(ours, wanted)
            dy = torch.ones_like(ours) if dy is None else dy
            leaves = list(sparse.parameters())
            for a, b in zip(
                torch.autograd.grad(ours, [given, *leaves], dy), torch.autograd.grad(wanted, [truth, *leaves], dy)
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"x must have the weight's 64 features last, got shape \(\)"):
        sparse(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got \[1.0\]"):
        sparse([1.0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_frozen_weights(pattern):
    _, sparse = layer(32, 64, SIDES.get(pattern, 1), 0.4, pattern=pattern)
    sparse.requires_grad_(False)
    x = torch.randn(5, 64, requires_grad=True)
    assert not sparse(x.detach()).requires_grad
    torch.testing.assert_close(torch.autograd.grad(sparse(x).sum(), x)[0], sparse.weight.sum(0).expand(5, 64))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_threads(pattern):
    """Several threads in the first forward after a change of mask and weight, while another copies the layer."""
    side = SIDES.get(pattern, 1)
    _, sparse = layer(128, 128, side, 0.4, pattern=pattern)
    sparse.eval()
    x, wrong = torch.randn(9, 128), []
    weight = dict(sparse.named_parameters())["weight"]
    for k in range(12):
        sparse.mask = random_mask(128, 128, side, 0.4, seed=k)
        weight.data.normal_()
        sparse.eval()
        truth = F.linear(x, weight.detach() * sparse.mask, sparse.bias)

        def run(copies, truth=truth):
            try:
                for _ in range(4):
                    with torch.no_grad():
                        module = copy.deepcopy(sparse) if copies else sparse
                        torch.testing.assert_close(module(x), truth)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=run, args=(k == 3,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_write_through_data_is_seen(pattern):
    """In eager mode at once, without gradients and with them, and a reader's write breaks no backward pass."""
    _, sparse = layer(32, 64, SIDES.get(pattern, 1), 0.4, pattern=pattern)
    x, weight = torch.randn(5, 64), dict(sparse.named_parameters())["weight"]
    sparse(x)
    for mode in (sparse.eval, sparse.train):
        mode()
        for _ in range(2):
            weight.data.add_(1)
            truth = F.linear(x, weight.detach() * sparse.mask, sparse.bias)
            with torch.no_grad():
                torch.testing.assert_close(sparse(x), truth)
            y = sparse(x)
            torch.testing.assert_close(y, truth)
            weight.data.add_(~sparse.mask)
            assert not sparse.weight[~sparse.mask].any()  # read between forward and backward
            y.sum().backward()


def test_a_weight_of_another_place():
    """What a layer knew of a weight says nothing of another one, nor of one that comes back."""
    _, sparse = layer(32, 64, 1, 0.4, pattern="dense")
    x, first = torch.randn(5, 64), sparse.weight
    sparse(x)
    sparse.weight = nn.Parameter(torch.ones(32, 64))
    torch.testing.assert_close(sparse(x), F.linear(x, sparse.mask.float(), sparse.bias))
    first.data.fill_(2)
    sparse.weight = first
    torch.testing.assert_close(sparse(x), F.linear(x, 2 * sparse.mask.float(), sparse.bias))
    assert isinstance(sparse, SparseLinear) and sparse.weight is first
