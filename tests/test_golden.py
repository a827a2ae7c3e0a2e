"""Results of the authors' own code, and a small file of ours made from the reference, so that every checkout tests
something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pycse import fused_focal_infonce, fused_infonce

OURS = Path(__file__).parent / "golden" / "contrastive.npz"
BUDGET = {torch.float64: 1e-11, torch.float32: 2e-5}


def results(file, backend, dtype):
    z1, z2 = (torch.tensor(file[name], dtype=dtype, requires_grad=True) for name in ("z1", "z2"))
    loss = fused_focal_infonce(z1, z2, float(file["temperature"]), float(file["margin"]), backend=backend)
    loss.backward()
    return {"loss": loss.detach(), "grad_z1": z1.grad, "grad_z2": z2.grad}


def assert_equal(actual, file, dtype):
    for name, value in actual.items():
        expected = torch.tensor(file[name])
        error = (value.double() - expected).norm() / expected.norm()
        assert error <= BUDGET[dtype], f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("number", range(16))
@pytest.mark.parametrize(
    "backend, dtype",
    [("reference", torch.float64), ("torch", torch.float64), ("cpu", torch.float64), ("cpu", torch.float32)],
    ids=str,
)
def test_focal_infonce_of_the_authors(number, backend, dtype, golden_folder):
    with np.load(golden_folder / f"focal_{number:02d}.npz") as file:
        assert_equal(results(file, backend, dtype), file, dtype)


@pytest.mark.parametrize("number", [0, 5, 10, 15])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_infonce_of_the_authors(number, backend, golden_folder):
    """DistillCSE's files hold InfoNCE + distillation; their difference is SimCSE's loss."""
    with np.load(golden_folder / f"distill_{number:02d}_none.npz") as file:
        loss = fused_infonce(
            torch.tensor(file["z1"]), torch.tensor(file["z2"]), float(file["temperature"]), backend=backend
        )
        expected = float(file["loss_total"]) - float(file["loss_distill"])
        assert abs(loss.item() - expected) <= 1e-10 * (1 + abs(float(file["loss_total"])))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_our_own_golden_file(backend):
    with np.load(OURS) as file:
        assert_equal(results(file, backend, torch.float64), file, torch.float64)
