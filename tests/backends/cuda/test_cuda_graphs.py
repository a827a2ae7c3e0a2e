"""Every path of the GPU backends in a CUDA graph: replayed on new inputs it gives what the call itself gives, and every
replay shuffles anew. Needs a GPU; the same comparisons run anywhere with ``replay`` as a plain call (backend
"torch")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import cuda_graphs
import pytest
import torch
from torch import Tensor

from pycse import alignment, fused_distill, fused_distillcse, fused_focal_infonce, fused_infonce, uniformity
from pycse.panels import contrastive as panel
from pycse.sparse import SparseLinear

pytestmark = [pytest.mark.clean_memory, pytest.mark.gpu]


@pytest.fixture(params=["triton", "cuda", "torch"])
def backend(request) -> str:
    if request.param == "torch":
        return "torch"
    request.getfixturevalue("cuda" if request.param == "triton" else "cuda_backend")
    return request.param


def device_of(backend: str) -> str:
    return "cpu" if backend == "torch" else "cuda"


def capture(step: Callable[[], Any], backend: str) -> Callable[[], Any]:
    return step if backend == "torch" else cuda_graphs.capture(step)


def same(replayed: Iterable[Tensor], called: Iterable[Tensor]) -> None:
    """Up to the library's products, which may be other ones while a graph is captured."""
    for x, y in zip(replayed, called):
        assert torch.isfinite(x).all()
        torch.testing.assert_close(x, y, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def compare(step: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...], backend: str) -> None:
    replay = capture(step, backend)
    for _ in range(2):
        with torch.no_grad():
            for z in inputs:
                z.normal_()
        replayed = [t.clone() for t in replay()]
        same(replayed, step())


def pair(backend: str, B: int, N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z1, z2 = (torch.randn(n, D, device=device_of(backend)).to(dtype).requires_grad_() for n in (B, N))
    return z1, z2


OPTIONS: list[dict[str, Any]] = [
    {},
    {"symmetric": True},
    {"exclude_above": 0.1},
    {"symmetric": True, "exclude_above": 0.1},
    {"temperature": 0.01},
    {"hard_negative_weight": 1.0, "query_ids": torch.arange(96) // 2, "key_ids": torch.arange(192) % 50},
    {"positives": (torch.arange(96) + 5)},
    {"reduction": "none"},
]


@pytest.mark.parametrize("rows", [13, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_contrastive(options, dtype, rows, backend, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, rows))
    device = device_of(backend)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    z1, z2 = pair(backend, 96, 96 if "symmetric" in options else 192, 64, dtype)

    def step() -> tuple[Tensor, ...]:
        loss = fused_focal_infonce(z1, z2, backend=backend, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), (z1, z2))

    compare(step, (z1, z2), backend)


@pytest.mark.parametrize("symmetric", [False, True])
def test_temperature_and_m_may_change_between_replays(symmetric, backend):
    z1, z2 = pair(backend, 70, 70, 32, torch.float32)
    tau, m = (torch.tensor(n, device=device_of(backend), requires_grad=True) for n in (0.05, 0.3))

    def step() -> tuple[Tensor, ...]:
        loss = fused_focal_infonce(z1, z2, tau, m, symmetric=symmetric, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (z1, z2, tau, m))

    replay = capture(step, backend)
    first = replay()[0].clone()
    with torch.no_grad():
        tau.fill_(0.1), m.fill_(-0.2)
    replayed = [t.clone() for t in replay()]
    assert replayed[0] != first
    same(replayed, step())


SHUFFLES: list[dict[str, Any]] = [
    {},
    {"group_size": 8, "divergence": "kl"},
    {"span": (1, 20), "divergence": "js"},
    {"shuffle": "expected"},
    {"shuffle": "none"},
]


@pytest.mark.parametrize("B", [64, 700])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("options", SHUFFLES, ids=str)
def test_distillation_shuffles_anew(options, joint, B, backend):
    device = device_of(backend)
    z1, z2 = pair(backend, B, B, 48, torch.bfloat16)
    teachers = [torch.randn(B, 32, device=device, dtype=torch.bfloat16) for _ in range(3)]
    seed = torch.tensor(1, device=device)

    def step(seed: Tensor | None = seed) -> tuple[Tensor, ...]:
        if joint:
            loss = fused_distillcse(z1, z2, teachers, seed=seed, backend=backend, **options).loss
        else:
            loss = fused_distill(z1, teachers, seed=seed, backend=backend, **options)
        return loss.detach(), *torch.autograd.grad(loss, (z1,))

    replay, seen = capture(step, backend), []
    for s in (1, 2, 2**40 + 1):
        seed.fill_(s)
        seen.append([t.clone() for t in replay()])
        same(seen[-1], step())
    sampled = "shuffle" not in options
    assert torch.equal(seen[0][1], seen[1][1]) == torch.equal(seen[1][1], seen[2][1]) == (not sampled)

    unseeded = capture(lambda: step(None), backend)  # seeds drawn on the device, one a replay
    first, second = ([t.clone() for t in unseeded()] for _ in range(2))
    assert torch.equal(first[1], second[1]) == (not sampled)


@pytest.mark.parametrize("loss", [uniformity, alignment, fused_infonce], ids=lambda f: f.__name__)
def test_the_other_losses(loss, backend):
    z1, z2 = pair(backend, 300, 300, 40, torch.bfloat16)
    inputs = (z1,) if loss is uniformity else (z1, z2)

    def step() -> tuple[Tensor, ...]:
        value = loss(*inputs, backend=backend)
        return value.detach(), *torch.autograd.grad(value, inputs)

    compare(step, inputs, backend)


@pytest.mark.parametrize("pattern, side", [("block64", 64), ("block16", 16), ("unstructured", 1)])
def test_sparse_layers(pattern, side, backend):
    device = device_of(backend)
    kept = torch.rand(128 // side, 192 // side, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = kept.repeat_interleave(side, 0).repeat_interleave(side, 1).to(device)
    dense = torch.nn.Linear(192, 128, device=device, dtype=torch.bfloat16)
    layer = SparseLinear.from_dense(dense, mask, pattern, backend=backend)
    x = torch.randn(70, 192, device=device).bfloat16().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y.sum(), (x, layer.weight, layer.bias))

    compare(step, (x,), backend)
