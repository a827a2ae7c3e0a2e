"""Every operator of the CPU backend, with each of its allocations failing once. Runs with failing.cpp preloaded.

A call that fails raises MemoryError, or PyTorch's RuntimeError for its own tensors; it leaves its inputs as they were
and no gradients, and the next call is right to the last bit.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from pycse.kernels import native
from torch import Tensor

from pycse import alignment, backends, fused_distill, fused_focal_infonce, uniformity
from pycse.backends.cpu import contrastive, distill
from pycse.sparse import SparseLinear, masked_linear

Call = Callable[[], Tensor]
SMALL = dict(contrastive.SMALL), dict(distill.SMALL)


def embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, device="cpu").to(dtype).requires_grad_()


def losses(small: bool) -> dict[str, tuple[list[Tensor], Call]]:
    """By name: the tensors that take part, and the call."""
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64
    calls: dict[str, tuple[list[Tensor], Call]] = {}
    # Larger panels are products in tiles where the processor has AMX.
    for dtype, (B, N, D) in {
        f32: (16, 20, 24) if small else (256, 256, 160),
        bf16: (16, 20, 24),
        f64: (9, 12, 17),
    }.items():
        z1, pair, z2 = (embeddings(n, D, dtype=dtype) for n in (B, B, N))
        t = embeddings(B, D, dtype=dtype).detach()
        tau = torch.tensor(0.05, dtype=torch.float32, device="cpu", requires_grad=True)
        name = str(dtype).removeprefix("torch.")
        calls[f"focal {name}"] = [z1, z2], lambda z1=z1, z2=z2: fused_focal_infonce(z1, z2, backend="cpu")
        calls[f"focal {name} temperature, threshold"] = (
            [z1, z2, tau],
            lambda z1=z1, z2=z2, tau=tau: fused_focal_infonce(z1, z2, tau, exclude_above=0.1, backend="cpu"),
        )
        calls[f"symmetric {name}"] = (
            [z1, pair],
            lambda z1=z1, pair=pair: fused_focal_infonce(z1, pair, symmetric=True, backend="cpu"),
        )
        calls[f"distill {name}"] = [z1, t], lambda z1=z1, t=t: fused_distill(z1, [t, t * 2], seed=1, backend="cpu")
        if not small:
            calls[f"uniformity {name}"] = [z1], lambda z1=z1: uniformity(z1, backend="cpu")
            calls[f"alignment {name}"] = [z1, pair], lambda z1=z1, pair=pair: alignment(z1, pair, backend="cpu")
    return calls


def layers() -> dict[str, tuple[list[Tensor], Call]]:
    calls: dict[str, tuple[list[Tensor], Call]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for pattern, block in {"unstructured": 1, "block16": 16, "block32": 32}.items():
            kept = torch.rand(96 // block, 64 // block, dtype=torch.float32, device="cpu") < 0.4
            kept[0, 0] = True
            mask = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
            dense = torch.nn.Linear(64, 96, dtype=dtype, device="cpu")
            x = embeddings(200, 64, dtype=dtype)
            name = f"{pattern} {str(dtype).removeprefix('torch.')}"
            layer = SparseLinear.from_dense(dense, mask, pattern, "cpu")
            calls[name] = [x, *layer.parameters()], lambda layer=layer, x=x: layer(x).square().mean()
            inference = SparseLinear.from_dense(dense, mask, pattern, "cpu").eval()
            calls[f"{name} packed"] = [x.detach(), *inference.parameters()], lambda m=inference, x=x: packed(m, x)
        w = embeddings(96, 64, dtype=dtype)
        calls[f"masked_linear {str(dtype).removeprefix('torch.')}"] = (
            [x, w],
            lambda x=x, w=w, mask=mask: masked_linear(x, w, mask, backend="cpu").square().mean(),
        )
    return calls


def packed(layer: SparseLinear, x: Tensor) -> Tensor:
    layer.train().eval()  # forgets what is packed
    with torch.no_grad():
        return layer(x).square().mean()


def run(tensors: list[Tensor], call: Call) -> list[Tensor]:
    """The value and the gradients."""
    for t in tensors:
        t.grad = None
    value = call()
    if value.requires_grad:
        value.backward()
    return [value.detach(), *(t.grad for t in tensors if t.grad is not None)]


def every_failure(name: str, tensors: list[Tensor], call: Call, shim: ctypes.CDLL) -> int:
    """How many allocations failed, each in a call of its own."""
    want, before = run(tensors, call), [t.detach().clone() for t in tensors]
    for n in range(1, 1000):
        for t in tensors:
            t.grad = None
        raised = None
        shim.failing_start(n)
        try:
            value = call()
            if value.requires_grad:
                value.backward()
        except MemoryError as error:
            raised = error
        except RuntimeError as error:
            assert "DefaultCPUAllocator" in str(error), (name, n, error)
            raised = error
        seen = shim.failing_stop()
        assert all(torch.equal(t, b) for t, b in zip(tensors, before)), f"{name}: failure {n} changed an input"
        if raised is None:
            assert seen == n - 1, f"{name}: failure {n} of {seen} was swallowed"
            break
        assert all(t.grad is None for t in tensors), f"{name}: failure {n} left a gradient ({raised})"
        got = run(tensors, call)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (
            f"{name}: the call after failure {n} is wrong"
        )
    else:
        raise AssertionError(f"{name}: no call succeeds")
    return n - 1


def main() -> None:
    shim = ctypes.CDLL(sys.argv[1])
    shim.failing_start.argtypes, shim.failing_stop.restype = [ctypes.c_long], ctypes.c_long
    torch.manual_seed(0)
    torch.set_num_threads(2)
    native()
    assert backends.unusable("cpu") is None
    assert shim.failing_find(), "pycse's module or libc10 is not where it was expected"
    total = 0
    for small in (True, False):
        if not small:
            contrastive.SMALL.clear(), distill.SMALL.clear()
        for name, (tensors, call) in losses(small).items():
            n = every_failure(f"{'small' if small else 'panels'} {name}", tensors, call, shim)
            assert n > 0, f"{name} allocates nothing?"
            total += n
    for name, (tensors, call) in layers().items():
        total += every_failure(name, tensors, call, shim)
    print(f"{total} failures")


if __name__ == "__main__":
    main()
