"""Tensors whose memory is not what it seems: negative views, zeros without memory, tensors of inference mode that
change."""

from __future__ import annotations

import pytest
import torch

from pycse import (
    alignment,
    fused_adapacse,
    fused_distill,
    fused_distillcse,
    fused_focal_infonce,
    fused_infonce,
    fused_sigmoid,
    fused_supcon,
    uniformity,
)

BACKENDS = ["cpu", "torch", "reference"]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calls(backend):
    teacher, classes = randn(8, 10, seed=7), torch.arange(8) // 3
    return {
        "infonce": lambda x, y, w: fused_infonce(x, y, weight=w, reduction="sum", backend=backend),
        "focal": lambda x, y, w: fused_focal_infonce(x, y, weight=w, symmetric=True, backend=backend),
        "rows": lambda x, y, w: fused_focal_infonce(x, y, weight=w, reduction="none", backend=backend),
        "adapacse": lambda x, y, w: fused_adapacse(
            x, y, guides=[(teacher, teacher)], weight=w, reduction="none", backend=backend
        ),
        "sigmoid": lambda x, y, w: fused_sigmoid(x, y, weight=w, reduction="sum", backend=backend),
        "distill": lambda x, y, w: fused_distill(x, [teacher, y.detach()], seed=1, weight=w, backend=backend),
        "distillcse": lambda x, y, w: (
            fused_distillcse(x, y, [y.detach()], seed=1, weight=w, reduction="none", backend=backend).loss
        ),
        "supcon": lambda x, y, w: fused_supcon(x, classes, y, classes, weight=w, backend=backend),
        "supcon of rows": lambda x, y, w: (
            fused_supcon(x, classes, weight=w, reduction="none", inside=True, backend=backend) + y.sum() * 0
        ),
        "alignment": lambda x, y, w: alignment(x, y, backend=backend) * w.sum(),
        "uniformity": lambda x, y, w: uniformity(x, backend=backend) + (y.sum() + w.sum()) * 0,
    }


def gradients(f, inputs, upstream=None):
    leaves = [t.detach().requires_grad_() for t in inputs]  # detach keeps the negative bit, and zeros without memory
    loss = f(*leaves)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream(loss))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def same(actual, expected, exact=True):
    for a, e in zip(actual, expected):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(
                torch.clone(a), torch.clone(e), rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_views(backend):
    x, y, w = randn(8, 12), randn(8, 12, seed=1), randn(8, seed=2).abs()
    for f in calls(backend).values():
        expected = gradients(f, (x, y, w))
        for k in range(3):
            inputs = [x, y, w]
            inputs[k] = torch._neg_view(-inputs[k])
            assert inputs[k].is_neg()
            same(gradients(f, inputs), expected)
        same(gradients(f, (x, y, w), lambda loss: torch._neg_view(torch.full_like(loss, -1.0))), expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])  # PyTorch's own operators refuse them in the reference's backward
def test_zeros_without_memory(backend):
    x, y, w = randn(8, 12), randn(8, 12, seed=1), randn(8, seed=2).abs()
    for f in calls(backend).values():
        for k in range(2):
            inputs = [x, y, w]
            inputs[k] = torch._efficientzerotensor(8, 12)
            plain = [t if n != k else torch.zeros(8, 12) for n, t in enumerate((x, y, w))]
            same(gradients(f, inputs), gradients(f, plain), exact=False)
        zeros = gradients(f, (x, y, w), lambda loss: torch._efficientzerotensor(loss.shape))
        assert all(g is None or not torch.clone(g).any() for g in zeros[1:])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_keys_of_inference_mode_may_be_overwritten(backend, reduction):
    """They have no version that would show a change before backward: what backward needs of them is a copy."""
    for B in (8, 70):
        x, y = randn(B, 12), randn(B, 12, seed=1)
        for f in (
            lambda x, y: fused_infonce(x, y, reduction=reduction, backend=backend),
            lambda x, y: fused_distill(x, [y], seed=1, reduction=reduction, backend=backend),
            lambda x, y: fused_distillcse(x, x, [y], seed=1, reduction=reduction, backend=backend).loss,
        ):
            leaf = x.clone().requires_grad_()
            loss = f(leaf, y)
            upstream = torch.linspace(1, 2, loss.numel()).view(loss.shape)
            (expected,) = torch.autograd.grad(loss, leaf, upstream)
            with torch.inference_mode():
                keys = y.clone()
            loss = f(leaf, keys)
            with torch.inference_mode():
                keys.fill_(3)
            (first,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
            (second,) = torch.autograd.grad(loss, leaf, upstream)
            torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_keys_that_have_a_version_are_checked(backend):
    x, y = randn(8, 12).requires_grad_(), randn(8, 12, seed=1)
    loss = fused_infonce(x, y, reduction="none", backend=backend)
    y.fill_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
