"""The losses under torch.func (grad, vjp, jacrev, vmap), torch.autograd.functional and torch.fx: right, or one clear
sentence."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import pycse.losses
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

BACKENDS = ["cpu", "torch"]
B, D, BATCH = 7, 12, 3
CLASSES = torch.tensor([0, 1, 0, 2, 1, 0, 3])


def tensors(*shapes):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(s, generator=g) for s in shapes]


def losses(backend, reduction):
    e1, e2, w = tensors((B, 9), (B, D), (B,))
    w = w.abs() + 0.1
    rows = dict(reduction=reduction, backend=backend)
    return {
        "infonce": lambda x, y: fused_infonce(x, y, **rows),
        "focal": lambda x, y: fused_focal_infonce(x, y, weight=w, exclude_above=0.4, **rows),
        "symmetric": lambda x, y: fused_focal_infonce(x, y, symmetric=True, **rows),
        "adapacse": lambda x, y: fused_adapacse(x, y, 0.1, 0.4, guides=[(e1, e1), (e2, e2)], weight=w, **rows),
        "sigmoid": lambda x, y: fused_sigmoid(x, y, 5.0, -2.0, weight=w, **rows),
        "distill": lambda x, y: fused_distill(x, [e1, y.detach()], seed=4, **rows) if backend else None,
        "distillcse": lambda x, y: fused_distillcse(x, y, [e1, e2], seed=4, **rows).loss,
        "supcon": lambda x, y: fused_supcon(x, CLASSES, y, CLASSES, 0.2, weight=w, **rows),
        "supcon of rows": lambda x, y: fused_supcon(x, CLASSES, inside=True, **rows) + 0 * y.sum(),
        "alignment": lambda x, y: alignment(x, y, backend=backend),
        "uniformity": lambda x, y: uniformity(x, backend=backend) + 0 * y.sum(),
    }


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_derivatives(backend, reduction):
    x, y = tensors((B, D), (B, D))
    for name, f in losses(backend, reduction).items():
        truth = losses("reference", reduction)[name]
        total, true_total = (lambda x, y, g=g: (g(x, y) * 2).sum() for g in (f, truth))
        same(grad(total, (0, 1))(x, y), grad(true_total, (0, 1))(x, y))
        same(jacrev(f)(x, y), jacrev(truth)(x, y))
        out, pull = vjp(f, x, y)
        same(pull(torch.full_like(out, 3.0)), vjp(truth, x, y)[1](torch.full_like(out, 3.0)))
        if reduction == "none" and name.startswith("distill"):
            with pytest.raises(RuntimeError, match="use torch.func.jacrev"):
                torch.autograd.functional.jacobian(f, (x, y), vectorize=True)
            continue
        vectorized = torch.autograd.functional.jacobian(f, (x, y), vectorize=True)
        same(vectorized, torch.autograd.functional.jacobian(truth, (x, y)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches(backend, reduction):
    """vmap is a loop over the batch, in either order with grad."""
    x, y = tensors((BATCH, B, D), (BATCH, B, D))
    for f in losses(backend, reduction).values():
        total = lambda x, y, f=f: f(x, y).sum()  # noqa: E731
        same(vmap(f)(x, y), torch.stack([f(a, b) for a, b in zip(x, y)]))
        same(vmap(f, (0, None))(x, y[0]), torch.stack([f(a, y[0]) for a in x]))
        same(vmap(f, (1, 0))(x.transpose(0, 1), y), vmap(f)(x, y))
        expected = [torch.stack(g) for g in zip(*(grad(total, (0, 1))(a, b) for a, b in zip(x, y)))]
        same(list(vmap(grad(total, (0, 1)))(x, y)), expected)
        same(list(grad(lambda x, y, t=total: vmap(t)(x, y).sum(), (0, 1))(x, y)), expected)
        leaf = x.clone().requires_grad_()
        vmap(total)(leaf, y).sum().backward()
        same(leaf.grad, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_for_each_of_a_batch(backend):
    x, y = tensors((BATCH, B, D), (BATCH, B, D))
    tau = torch.tensor([0.05, 0.1, 0.3])
    f = lambda x, y, t, backend=backend: fused_focal_infonce(x, y, t, t * 3, backend=backend)  # noqa: E731
    truth = lambda x, y, t: f(x, y, t, "reference")  # noqa: E731
    same(vmap(grad(f, (0, 2)))(x, y, tau), vmap(grad(truth, (0, 2)))(x, y, tau))


def test_an_ensemble_of_encoders():
    """Stacked parameters through functional_call, as torch.func's guide on ensembles does it."""
    models = [torch.nn.Linear(D, 5) for _ in range(BATCH)]
    parameters, _ = torch.func.stack_module_state(models)
    x, y = tensors((B, D), (B, D))

    def loss(p):
        return fused_infonce(functional_call(models[0], p, (x,)), functional_call(models[0], p, (y,)), backend="cpu")

    got = vmap(grad(loss))(parameters)
    for k, model in enumerate(models):
        fused_infonce(model(x), model(y), backend="reference").backward()
        same(got["weight"][k], model.weight.grad)


def test_gradients_of_one_dtype_under_autocast():
    x, y = tensors((B, D), (B, D))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grad(lambda x: fused_infonce(x, y, backend="cpu"))(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, grad(lambda x: fused_infonce(x, y, backend="cpu"))(x), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_there_says_so(backend):
    x, y = tensors((B, D), (B, D))
    for name, f in losses(backend, "mean").items():
        if name == "uniformity":
            f = lambda x, y: uniformity(x, backend=backend)  # noqa: E731
        for call in (lambda f=f: jvp(f, (x, y), (y, x)), lambda f=f: jacfwd(f)(x, y), lambda f=f: hessian(f)(x, y)):
            with pytest.raises(RuntimeError, match="forward-mode derivatives.*backend='reference'"):
                call()
        with pytest.raises(RuntimeError, match="double backward through a fused loss"):
            grad(lambda x, f=f: grad(f)(x, y).square().sum())(x)
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward"),
        ):
            f(torch.autograd.forward_ad.make_dual(x, y), y)
    with pytest.raises(RuntimeError, match="vmap cannot batch"):
        vmap(lambda x: fused_distill(x, [y], seed=1, backend="reference"))(torch.stack([x, y]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_mixed_second_derivative_raises(reduction):
    """Also through an input that the inner transform does not differentiate: never a silent zero."""
    x, y = tensors((B, D), (B, D))
    w = torch.ones(B)

    def penalty(a, w):
        inner = lambda b: fused_infonce(a, b, weight=w, reduction=reduction, backend="cpu").sum()  # noqa: E731
        return grad(inner)(y).square().sum()

    for k in (0, 1):
        with pytest.raises(RuntimeError, match="double backward"):
            grad(penalty, k)(x, w)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        penalty(leaf, w).backward()


def test_a_compiled_transform_is_refused():
    x, y = tensors((B, D), (B, D))
    f = lambda x, y: grad(lambda x: fused_infonce(x, y, backend="cpu"))(x)  # noqa: E731
    with pytest.raises(Exception, match="graph_break|not compiled"):
        torch.compile(f, backend="eager", fullgraph=True)(x, y)


def test_second_derivatives_of_the_reference():
    x, y = tensors((3, 4), (3, 4))
    f = lambda x: fused_infonce(x, y, 0.5, backend="reference")  # noqa: E731
    same(hessian(f)(x), torch.autograd.functional.hessian(f, x))
    same(jvp(f, (x,), (y,))[1], (grad(f)(x) * y).sum())


def test_symbolic_trace_finds_a_proxy_among_teachers():
    class Distilled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("z", tensors((B, D))[0])

        def forward(self, e):
            return fused_distill(self.z, [e], seed=1)

    (e,) = tensors((B, 5))
    same(torch.fx.symbolic_trace(Distilled())(e), Distilled()(e))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(D, D)
        self.loss = pycse.losses.FocalInfoNCELoss(torch.nn.Parameter(torch.tensor(0.1)))
        self.distill = pycse.losses.DistillCSELoss()

    def forward(self, x, y):
        z = self.encoder(x)
        both = self.loss(z, y) + self.distill(z, y, [y], seed=1).loss
        return both + alignment(z, y) + uniformity(z) + fused_infonce(z1=z, z2=y)


def test_symbolic_trace_records_each_loss_as_one_node():
    model = Model()
    x, y = tensors((B, D), (B, D))
    graph = torch.fx.symbolic_trace(model)
    names = [
        node.target.__name__
        for node in graph.graph.nodes
        if node.op == "call_function" and hasattr(node.target, "__wrapped__")
    ]
    assert names == ["fused_focal_infonce", "fused_distillcse", "alignment", "uniformity", "fused_infonce"]
    same(graph(x, y), model(x, y))
    graph(x, y).backward()
    expected = torch.autograd.grad(model(x, y), list(model.parameters()))
    for p, g in zip(graph.parameters(), expected):
        same(p.grad, g)
