"""Products of panels on the CPU: in AMX tiles where the processor has them, by PyTorch elsewhere. Values, layouts,
ragged sides."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pycse.kernels import native

import pycse
from pycse.backends.cpu import products
from pycse.backends.cpu.products import LEAST, Products
from pycse.panels import contrastive, distill, uniformity

LAYOUTS = {  # how a (M, K) and b (K, N) lie in memory
    "x w^T": (lambda a: a, lambda b: b.t().contiguous().t()),
    "x w": (lambda a: a, lambda b: b),
    "x^T w": (lambda a: a.t().contiguous().t(), lambda b: b),
    "x^T w^T": (lambda a: a.t().contiguous().t(), lambda b: b.t().contiguous().t()),
}
SHAPES = [
    (128, 256, 512),
    (161, 2080, 96),
    (300, 64, 1027),
    (1000, 777, 32),
    (33, 768, 1100),
    (2049, 160, 64),
    (257, 1056, 320),
]


def factors(M, K, N, layout, dtype=torch.float32):
    g = torch.Generator().manual_seed(M * K + N)
    a, b = torch.randn(M, K, generator=g, dtype=dtype), torch.randn(K, N, generator=g, dtype=dtype)
    left, right = LAYOUTS[layout]
    return left(a), right(b)


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7FC00000, 0x7FFF8000, 0x7F800001])
def test_nan_stays_nan(bits):
    a, b = factors(256, 256, 256, "x w^T")
    a[5, 7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    ours = Products(a).product(a, b, torch.empty(256, 256))
    assert ours[5].isnan().all() and ours[torch.arange(256) != 5].isfinite().all()


def test_the_largest_numbers():
    a, b = factors(256, 256, 256, "x w^T")
    a[5], b = torch.finfo(torch.float32).max, b * 1e-3
    a[6] = -a[5]
    ours = Products(a).product(a, b, torch.empty(256, 256))
    assert off(ours, a.double() @ b.double()) < 1e-6


def off(ours, truth):
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_as_precise_as_pytorch(M, K, N, layout, add):
    a, b = factors(M, K, N, layout)
    k = Products(a)
    start = torch.randn(M, N, generator=torch.Generator().manual_seed(0))
    truth, eager = a.double() @ b.double(), a @ b
    if add:
        ours = start.clone()
        k.add_product(ours, a, b)
        truth, eager = truth + start, eager + start
    else:
        ours = k.product(a, b, torch.full((M, N), float("nan")))
    assert off(ours, truth) <= 2 * off(eager, truth) + 1e-7


@pytest.mark.parametrize("layout", list(LAYOUTS)[:3])
def test_results_and_factors_inside_wider_rows(layout):
    """Leading dimensions that are no multiple of anything, and memory around the result that stays as it was."""
    a, b = factors(160, 512, 257 if layout == "x w^T" else 256, layout)
    M, N = 160, b.shape[1]
    wide = torch.full((M, N + 5), 7.0)
    padded_a = torch.zeros(a.shape[0] + 3, a.shape[1] + 3)
    view = padded_a[: a.shape[0], : a.shape[1]]
    if layout == "x^T w":
        view = torch.zeros(a.shape[1] + 3, a.shape[0] + 3)[: a.shape[1], : a.shape[0]].t()
    view.copy_(a)
    Products(a).product(view, b, wide[:, :N])
    assert off(wide[:, :N], a.double() @ b.double()) < 1e-6
    assert (wide[:, N:] == 7).all()


def test_what_runs_in_tiles():
    if not native().has_dense_products():
        pytest.skip(f"kernels for {native().cpu_isa()} leave products to PyTorch")
    for layout in list(LAYOUTS)[:3]:
        a, b = factors(256, 512, 256, layout)
        assert Products(a)._tiled(torch.empty(256, 256), a, b, False)
    a, b = factors(256, 512, 256, "x w")
    k = Products(a)
    refused = {
        "both transposed": (*factors(256, 512, 256, "x^T w^T"), torch.empty(256, 256)),
        "float64": (a.double(), b.double(), torch.empty(256, 256, dtype=torch.float64)),
        "a result by columns": (a, b, torch.empty(256, 256).t()),
        "few rows": (a[: products.LEAST_ROWS - 1], b, torch.empty(products.LEAST_ROWS - 1, 256)),
        "a ragged depth": (*factors(256, 511, 256, "x w^T"), torch.empty(256, 256)),
        "little work": (*factors(128, 32, 128, "x w^T"), torch.empty(128, 128)),
    }
    assert LEAST > 128 * 32 * 128
    for name, (left, right, total) in refused.items():
        before = total.clone()
        assert not k._tiled(total, left, right, False), name
        assert torch.equal(total.nan_to_num(), before.nan_to_num()), name


def losses():
    from functools import partial

    return {
        "focal": pycse.fused_focal_infonce,
        "hard negatives": lambda a, b, **k: pycse.fused_focal_infonce(a, torch.cat([b, b.flip(0)]), **k),
        "symmetric": partial(pycse.fused_infonce, symmetric=True),
        "distillcse": lambda a, b, **k: (
            pycse.fused_distillcse(a, b, [a.detach().roll(1, 1), b.detach()], shuffle="none", **k).loss
        ),
        "uniformity": lambda a, b, **k: pycse.uniformity(torch.cat([a, b]), **k),
    }


@pytest.mark.parametrize("N, D", [(1057, 96), (600, 384)])
@pytest.mark.parametrize("loss", losses())
def test_losses_of_large_batches(loss, N, D, monkeypatch):
    """Every driver in several panels and in one, against float64."""
    g = torch.Generator().manual_seed(N)
    a, b = (torch.randn(N, D, generator=g, dtype=torch.float64) + 0.5 for _ in range(2))

    def run(dtype, backend):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (a, b)]
        value = losses()[loss](*leaves, backend=backend)
        value.backward()
        return [value.detach().double(), *(t.grad.double() for t in leaves)]

    truth, eager = run(torch.float64, "reference"), run(torch.float32, "torch")
    for panel_bytes in (32 << 20, 1 << 20):
        for module in (contrastive, distill, uniformity):
            monkeypatch.setattr(module, "PANEL_BYTES", panel_bytes)
        for t, e, ours in zip(truth, eager, run(torch.float32, "cpu")):
            assert off(ours, t) <= 2 * off(e, t) + 1e-6


def test_the_same_for_any_number_of_threads():
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            outs = []
            for layout in list(LAYOUTS)[:3]:
                a, b = factors(256, 1056, 320, layout)  # no ragged side: MKL's results depend on its threads
                outs.append(Products(a).product(a, b, torch.empty(256, 320)))
            results.append(outs)
        finally:
            torch.set_num_threads(before)
    if not native().has_dense_products():
        pytest.skip(f"kernels for {native().cpu_isa()} leave products to PyTorch")
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_fewer_threads_than_asked_for(tmp_path):
    """OpenMP may give a kernel fewer threads; none of its work may be left out. float32 alone: PyTorch's bfloat16
    products leave some out.
    """
    script = (
        "import torch\n"
        "from test_products import LAYOUTS, SHAPES, test_as_precise_as_pytorch as test\n"
        "from test_sparse_kernels import check\n"
        "torch.set_num_threads(4)\n"
        "for shape in SHAPES:\n"
        "    for layout in LAYOUTS: test(*shape, layout, False)\n"
        "for block in (1, 16, 32, 64):\n"
        "    check(300, 256, 1536, block, 0.3, torch.float32, 'cpu'), check(300, 1536, 256, block, 0.3, torch.float32, 'cpu')\n"
        "print('checked')\n"
    )
    found = os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "sparse")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_THREAD_LIMIT": "2", "PYTHONPATH": found},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "checked" in done.stdout
