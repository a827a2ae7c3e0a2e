"""What PyTorch expects of an operator: opcheck, compile, autocast, repeated and scaled backwards, loss scaling."""

from __future__ import annotations

import copy
import gc
import shutil

import pytest
import torch

from pycse import fused_distillcse, fused_focal_infonce, fused_infonce
from pycse.losses import FocalInfoNCELoss, InfoNCELoss
from pycse.ops.contrastive import contrastive as fused
from pycse.problem import Contrastive

from oracle import Case

contrastive = fused.op

BACKENDS = ["torch", "cpu"]


def pair(B=12, N=20, D=16, dtype=torch.float32, grad=True):
    z1, z2 = (z.to(dtype) for z in Case(B, N, D).embeddings())
    return (z1.requires_grad_(), z2.requires_grad_()) if grad else (z1, z2)


def arguments(z1, z2, backend, tensors=False, reduction="mean", symmetric=False):
    tau = torch.tensor(0.07, requires_grad=True) if tensors else None
    m = torch.tensor(0.2, requires_grad=True) if tensors else None
    weight = torch.rand(z1.shape[0]).requires_grad_() if tensors else None
    p = Contrastive(
        z1,
        z2,
        0.05 if tau is None else tau,
        0.3 if m is None else m,
        weight,
        form="focal",
        symmetric=symmetric,
        reduction=reduction,
    )
    return *fused.arguments.flat(p, backend=backend, validate=False), [False] * 5


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(backend, tensors, reduction):
    z1, z2 = pair()
    torch.library.opcheck(contrastive, arguments(z1, z2, backend, tensors, reduction))
    with torch.no_grad():
        torch.library.opcheck(contrastive, arguments(z1.detach(), z2.detach(), backend, reduction=reduction))


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_opcheck_dtypes(backend, dtype):
    z1, z2 = pair(12, 12, dtype=dtype)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(contrastive, arguments(z1, z2, backend), test_utils=checks)
    torch.library.opcheck(contrastive, arguments(z1, z2, backend, symmetric=True), test_utils=checks)


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(backend, dynamic):
    torch._dynamo.reset()

    def step(z1, z2):
        return fused_focal_infonce(z1 * 2, z2 * 3, 0.05, 0.3, backend=backend) * 4

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, N in ((12, 20), (9, 31), (5, 8)):
        results = []
        for function in (step, compiled):
            z1, z2 = pair(B, N)
            loss = function(z1, z2)
            loss.backward()
            results.append((loss.detach(), z1.grad, z2.grad))
        for eager, traced in zip(*results):
            torch.testing.assert_close(traced, eager)


@pytest.mark.clean_memory
def test_compile_with_inductor(tmp_path, monkeypatch):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()

    def step(z1, z2):
        return fused_focal_infonce(z1 * 2, z2.relu(), reduction="none").square().mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        z1, z2 = pair()
        loss = function(z1, z2)
        loss.backward()
        results.append((loss.detach(), z1.grad, z2.grad))
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager)


@pytest.mark.clean_memory
def test_compiled_module_with_trained_temperature():
    torch._dynamo.reset()
    module = FocalInfoNCELoss(torch.nn.Parameter(torch.tensor(0.05)), m=torch.nn.Parameter(torch.tensor(0.3)))
    traced = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    z1, z2 = pair()
    module(z1, z2).backward()
    traced(z1.detach(), z2.detach()).backward()
    torch.testing.assert_close(traced.temperature.grad, module.temperature.grad)
    torch.testing.assert_close(traced.m.grad, module.m.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_and_any_upstream_gradient(backend, reduction):
    z1, z2 = pair()
    loss = fused_focal_infonce(z1, z2, reduction=reduction, backend=backend)
    upstream = torch.ones_like(loss)
    loss.backward(upstream, retain_graph=True)
    once = z1.grad.clone()
    loss.backward(upstream, retain_graph=True)
    torch.testing.assert_close(z1.grad, 2 * once)
    loss.backward(upstream * -0.5)
    torch.testing.assert_close(z1.grad, 1.5 * once)
    if reduction != "none":  # the scalar again, seen through other operations first
        z1.grad = None
        (fused_focal_infonce(z1, z2, reduction=reduction, backend=backend) * 3).backward()
        torch.testing.assert_close(z1.grad, 3 * once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_given_away_are_not_changed_later(backend):
    z1, z2 = pair()
    loss = fused_focal_infonce(z1, z2, backend=backend)
    (first,) = torch.autograd.grad(loss, z1, retain_graph=True)
    kept = first.clone()
    first.mul_(7)  # the caller's to use
    (second,) = torch.autograd.grad(loss * 2, z1)
    torch.testing.assert_close(second, 2 * kept)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_of_inference_mode_may_be_keys_teachers_and_weights(backend, reduction):
    """SentenceTransformer.encode makes such; autograd cannot save them."""
    z1, z2 = pair(12, 12)
    with torch.inference_mode():
        made = [z2.detach().clone(), torch.rand(12, 5), torch.rand(12), torch.tensor(3)]

    def gradient(z2, teacher, weight, seed):
        options = dict(weight=weight, seed=seed, reduction=reduction, backend=backend)
        return torch.autograd.grad(fused_distillcse(z1, z2, [teacher], **options).loss.sum(), z1)[0]

    if backend == "reference":  # plain autograd, which saves the keys
        made[0] = made[0].clone()
        made[2] = made[2].clone()
    torch.testing.assert_close(gradient(*made), gradient(*(t.clone() for t in made)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_views_are_read_as_their_values(backend):
    """``x.conj().imag`` is a view whose sign stands in a flag, not in its memory."""
    z1, z2 = pair(12, 12, grad=False)
    weight, teacher = torch.rand(12), torch.rand(12, 5)
    views = [torch._neg_view(-t) for t in (z1, z2, weight, teacher)]
    assert all(t.is_neg() for t in views)
    results = []
    for a, b, w, e in ((z1, z2, weight, teacher), views):
        a = a.requires_grad_()
        for reduction in ("mean", "none"):
            loss = fused_distillcse(a, b, [e], weight=w, seed=1, reduction=reduction, backend=backend).loss
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), a)))
    for plain, view in zip(results[:2], results[2:]):
        torch.testing.assert_close(view, plain)


def test_forward_mode_derivatives_are_refused():
    z1, z2 = pair(grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z1, torch.ones_like(z1))
        with pytest.raises(RuntimeError, match="jvp"):
            fused_focal_infonce(dual, z2, backend="cpu")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_is_refused():
    """A trace would not see what native code writes."""
    with pytest.raises(RuntimeError, match="use torch.compile"):
        torch.jit.trace(lambda a, b: fused_focal_infonce(a, b, backend="cpu"), pair(grad=False))


def test_meta_tensors_have_shapes():
    z1, z2 = (z.detach().to("meta").requires_grad_() for z in pair())
    loss = fused_focal_infonce(z1, z2, reduction="none")
    assert loss.is_meta and loss.shape == (12,)
    rows = fused_distillcse(z1, z2, [z1.detach()], reduction="none")
    assert rows.loss.is_meta and rows.distillation.shape == (12,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_says_what_to_do(backend):
    z1, z2 = pair()
    loss = fused_focal_infonce(z1, z2, backend=backend)
    (grad,) = torch.autograd.grad(loss, z1, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference' for second derivatives"):
        grad.sum().backward()


def test_double_backward_works_in_the_reference():
    z1, z2 = pair()
    (grad,) = torch.autograd.grad(fused_focal_infonce(z1, z2, backend="reference"), z1, create_graph=True)
    grad.pow(2).sum().backward()
    assert z1.grad.isfinite().all() and z1.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_computes_no_gradients(backend, monkeypatch):
    from pycse.backends.cpu import contrastive as cpu
    from pycse.panels import contrastive as panel

    monkeypatch.setattr(cpu, "SMALL", {})
    seen = []
    original = panel.contrastive
    monkeypatch.setattr(panel, "contrastive", lambda p, k: seen.append(p.needs) or original(p, k))
    z1, z2 = pair()
    with torch.no_grad():
        loss = fused_focal_infonce(z1, z2, backend=backend)
    assert not loss.requires_grad and not any(seen[0])
    with torch.inference_mode():
        torch.testing.assert_close(fused_focal_infonce(z1, z2, backend=backend).clone(), loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_embeddings_only(backend, dtype):
    z1, z2 = pair()
    tau = torch.tensor(0.05, requires_grad=True)
    with torch.autocast("cpu", dtype):
        loss = fused_focal_infonce(z1, z2, tau, backend=backend)
        mixed = fused_focal_infonce(z1, z2.to(dtype), tau, backend=backend)
    assert loss.dtype == torch.float32
    loss.backward()
    assert z1.grad.dtype == torch.float32 and tau.grad.dtype == torch.float32
    lower = fused_focal_infonce(z1.to(dtype), z2.to(dtype), 0.05, backend=backend)
    torch.testing.assert_close(loss, lower)
    torch.testing.assert_close(mixed, lower)
    with torch.autocast("cpu", dtype):  # backward inside the region, through the path that computes again
        rows = fused_focal_infonce(z1, z2, reduction="none", backend=backend)
        rows.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradients_survive_a_loss_scale_of_65536(backend):
    """Unscaled, these gradients are below half precision's smallest number."""
    z1, z2 = pair(64, 64, 32)
    z1, z2 = (z.detach().half().mul(8192).requires_grad_() for z in (z1, z2))
    (fused_focal_infonce(z1, z2, backend=backend) * 2**16).backward()
    a, b = (z.detach().double().requires_grad_() for z in (z1, z2))
    (fused_focal_infonce(a, b, backend="reference") * 2**16).backward()
    assert a.grad.abs().median() / 2**16 < 2**-24
    for x, y in ((z1.grad, a.grad), (z2.grad, b.grad)):
        assert x.dtype == torch.float16
        assert (x.double() - y).norm() / y.norm() < 2e-3


@pytest.mark.clean_memory
def test_gradients_are_handed_over_without_a_copy():
    z1, z2 = pair(64, 64, 64)
    loss = fused_focal_infonce(z1, z2, backend="cpu")
    made = [t.data_ptr() for t in loss.grad_fn.gradients[:2]]
    loss.backward()
    assert [z1.grad.data_ptr(), z2.grad.data_ptr()] == made
    assert loss.grad_fn.gradients is None


@pytest.mark.clean_memory
def test_nothing_is_kept_alive():
    import weakref

    z1, z2 = pair()
    loss = fused_focal_infonce(z1, z2)
    dead = weakref.ref(z1)
    loss.backward()
    del z1, loss
    gc.collect()
    assert dead() is None


def test_modules_hold_configuration_only():
    z1, z2 = pair(8, 16, grad=False)
    ids = torch.arange(8) % 3, torch.arange(16) % 3
    module = FocalInfoNCELoss(0.07, 0.2, hard_negative_weight=0.5, reduction="sum")
    expected = fused_focal_infonce(
        z1, z2, 0.07, 0.2, hard_negative_weight=0.5, reduction="sum", query_ids=ids[0], key_ids=ids[1]
    )
    torch.testing.assert_close(module(z1, z2, query_ids=ids[0], key_ids=ids[1]), expected)
    assert "m=0.2" in repr(module) and "temperature=0.07" in repr(module)
    assert not list(module.parameters()) and not module.state_dict()
    plain = InfoNCELoss(torch.nn.Parameter(torch.tensor(0.1)))
    assert set(plain.state_dict()) == {"temperature"}
    torch.testing.assert_close(plain(z1, z2), fused_infonce(z1, z2, 0.1))
    copy.deepcopy(module)


def test_training_with_it_works():
    """A few steps of the losses lower them, with temperature and m trained along."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(20, 16)
    module = FocalInfoNCELoss(torch.nn.Parameter(torch.tensor(0.1)), torch.nn.Parameter(torch.tensor(0.3)))
    optimizer = torch.optim.Adam([*encoder.parameters(), *module.parameters()], lr=1e-2)
    x = torch.randn(64, 20)
    losses = []
    for _ in range(60):
        loss = module(encoder(x + 0.5 * torch.randn_like(x)), encoder(x + 0.5 * torch.randn_like(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
