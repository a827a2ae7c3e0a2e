"""The Triton backend of alignment and uniformity against the float64 reference.

As test_triton.py: on a CUDA GPU where there is one, and in any case once more in a process of its own with
TRITON_INTERPRET=1 on CPU tensors. That the kernels compile is tests/helpers/triton_compile.py's, which test_triton.py runs.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

from interpreter import CUDA, INTERPRETED, run_interpreted

from pycse import alignment, uniformity
from pycse.panels import uniformity as panel

from oracle import BAND


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, 30)


DTYPES = [torch.float64, torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])


def compare(loss, device: str, dtype: torch.dtype, *zs: torch.Tensor) -> None:
    results = []
    for backend, where, kind in (("reference", "cpu", torch.float64), ("triton", device, dtype)):
        leaves = [z.to(dtype).to(kind).to(where).requires_grad_() for z in zs]
        value = loss(*leaves, backend)
        value.backward()
        results.append([value.detach(), *(z.grad for z in leaves)])
    for truth, ours in zip(*results):
        off = (ours.double().cpu() - truth).norm() / truth.norm().clamp_min(0.1)
        assert off <= 4 * BAND[dtype], f"off by {off:.1e}"


def points(N: int, D: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize, t", [(True, 2.0), (True, 40.0), (False, 2.0)])
@pytest.mark.parametrize("N, D", [(2, 1), (33, 24), (131, 40)])
def test_uniformity(N, D, normalize, t, dtype, device):
    z = points(N, D) / (1 if normalize else D**0.5)
    t = 2.0 if dtype in (torch.float16, torch.bfloat16) else t
    compare(lambda z, b: uniformity(z, t, normalize=normalize, backend=b), device, dtype, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_of_13_rows(dtype, device, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda p, *_: min(p.z.shape[0], 13))
    compare(lambda z, b: uniformity(z, backend=b), device, dtype, points(70, 24))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("B, D", [(1, 1), (65, 24)])
def test_alignment(B, D, normalize, dtype, device):
    x = points(B, D) / D**0.5
    compare(lambda x, y, b: alignment(x, y, normalize=normalize, backend=b), device, dtype, x, x + points(B, D, 1) / 9)


def test_zero_and_equal_rows(device):
    z = points(40, 8)
    z[::3], z[1::3] = 0, z[1].clone()
    compare(lambda z, b: uniformity(z, 30.0, backend=b), device, torch.float64, z)
