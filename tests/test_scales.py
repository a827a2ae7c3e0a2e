"""Embeddings of any scale, row by row: every finite row has the loss and the gradient that its direction gives.

Errors are relative to each row's own gradient, which is 1/|z| long: in a norm over all rows a row of 1e25 would not
count.
"""

from __future__ import annotations

import pytest
import torch
from instruction_sets import each, run_with
from torch import Tensor

from pycse import alignment, fused_distill, fused_distillcse, fused_focal_infonce, fused_infonce, uniformity

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LARGEST = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float64: 1.7e308}
BAND = {
    torch.float32: 2e-5,
    torch.bfloat16: 0.15,
    torch.float64: 1e-11,
}  # bf16: logits of a distillation are off by 0.15
BACKENDS = ["cpu", "torch"]


def views(B: int, dtype: torch.dtype, D: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator("cpu").manual_seed(B)
    z = torch.randn(2, B, D, generator=g, dtype=torch.float64, device="cpu")
    z[1] += z[0] / 2
    return z[0].to(dtype), z[1].to(dtype)


def scaled(z: Tensor, row: int, scale: float) -> Tensor:
    """Row ``row`` at its largest entry times ``scale`` (at most the type's largest number)."""
    z = z.clone()
    z[row] = (z[row].double() / z[row].double().abs().max() * scale).to(z.dtype)
    return z


def outcome(run, inputs, double: bool):
    leaves = [x.to(torch.float64 if double else x.dtype, copy=True).requires_grad_() for x in inputs]
    loss = run(*leaves)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def close_by_rows(run, inputs, dtype) -> None:
    """run(*inputs, backend) against the float64 reference: at most twice the error of the reference in the inputs'
    dtype, and a rounding band; rows' gradients in units of what a row of that length has."""
    loss, gradients = outcome(run, inputs, False)
    truth, expected = outcome(lambda *z: run(*z, backend="reference"), inputs, True)
    eager_loss, eager = outcome(lambda *z: run(*z, backend="reference"), inputs, False)
    assert torch.isfinite(loss)
    assert abs(loss.double() - truth) <= 2 * abs(eager_loss.double() - truth) + BAND[dtype] * (1 + truth.abs())
    for g, e, other, z in zip(gradients, expected, eager, inputs):
        assert torch.isfinite(g).all()
        # What the gradient's own type can hold of it: its smallest number, D times.
        grain = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * z.shape[1]
        own = torch.maximum(e.norm(dim=1), (0.1 / z.double().abs().amax(1)).nan_to_num(posinf=0))
        budget = 2 * (other.double() - e).norm(dim=1).nan_to_num(nan=0) + BAND[dtype] * own + grain
        assert ((g.double() - e).norm(dim=1) <= budget).all()


def scales(dtype):
    return (1e-11, 1e25, 1e160, LARGEST[dtype]) if dtype == torch.float64 else (1e-11, 1e15, 1e25, 1e37, LARGEST[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [8, 150])  # one native call; panels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_of_any_length(dtype, B, backend):
    for scale in scales(dtype):
        for side in (0, 1):
            z = list(views(B, dtype))
            z[side] = scaled(z[side], 3, scale)
            # A threshold decides by rounding in bfloat16: no error bound holds there.
            sharp = {"temperature": 0.02} if dtype == torch.bfloat16 else {"exclude_above": 0.3, "temperature": 0.01}
            for options in ({}, {"symmetric": True}, sharp):
                loss = fused_infonce if options else fused_focal_infonce
                close_by_rows(lambda x, y, backend=backend, f=loss, o=options: f(x, y, backend=backend, **o), z, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_losses_of_a_row_of_any_length(dtype, backend):
    for scale in scales(dtype):
        for B in (8, 150):
            x, y = views(B, dtype)
            teachers = [scaled(y, 2, scale)]  # of any scale too

            def distill(a, backend, teachers=teachers):
                return fused_distill(a, teachers, shuffle="none", backend=backend)

            def both(a, b, backend, teachers=teachers):
                return fused_distillcse(a, b, teachers, shuffle="none", backend=backend).loss

            for z in ((scaled(x, 2, scale), y), (x, scaled(y, 2, scale))):
                for f in (alignment, both):
                    close_by_rows(lambda a, b, backend=backend, f=f: f(a, b, backend=backend), z, dtype)
            for f in (uniformity, distill):
                close_by_rows(lambda a, backend=backend, f=f: f(a, backend=backend), (scaled(x, 2, scale),), dtype)


@each
def test_on_every_instruction_set(isa, tmp_path):
    run_with(
        isa,
        tmp_path,
        "import torch, test_scales as t\nfor B in (8, 150): t.test_one_row_of_any_length(torch.float32, B, 'cpu')",
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_row_that_is_not_finite_is_seen(backend):
    for bad in (float("nan"), float("inf")):
        for B in (8, 150):
            for side in (0, 1):
                z = list(views(B, torch.float32))
                z[side][1, 2] = bad
                assert fused_infonce(*z, backend=backend).isnan()
                assert fused_focal_infonce(*z, symmetric=True, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_of_nothing_but_nan_is_nan(backend):
    """Two rows: a column has one negative, and without it no maximum."""
    for dtype in (torch.float32, torch.float64):
        for side, row in ((0, 0), (0, 1), (1, 0), (1, 1)):
            z = list(views(2, dtype))
            z[side][row] = float("nan")
            for temperature in (0.01, 0.05):
                loss = fused_infonce(*z, temperature, symmetric=True, reduction="none", backend=backend)
                assert loss.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_temperature_that_the_type_cannot_resolve_is_refused(dtype):
    z = views(8, dtype)
    least = 1e-12 if dtype == torch.float64 else 1e-6
    for backend in ("cpu", "torch", "reference"):
        for symmetric in (False, True):
            loss = fused_infonce(*z, 2 * least, symmetric=symmetric, backend=backend)
            assert torch.isfinite(loss)
            for temperature in (least / 2, torch.tensor(least / 2, dtype=torch.float64, device="cpu")):
                with pytest.raises(ValueError, match="temperature must be larger"):
                    fused_infonce(*z, temperature, symmetric=symmetric, backend=backend)
    with pytest.raises(ValueError, match="temperature must be larger"):
        fused_focal_infonce(*z, 2 * least, m=10.0)
    with pytest.raises(ValueError, match="hard_negative_weight"):
        fused_infonce(z[0][:4], z[1], hard_negative_weight=2 / least)
    with pytest.raises(ValueError, match="student_temperature must be at least"):
        fused_distill(z[0], [z[1]], student_temperature=1e-13)
    with pytest.raises(ValueError, match="t must be at most"):
        uniformity(z[0], t=1e7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [8, 150])
def test_sharp_rows_are_right_to_the_last_temperature(dtype, B):
    """One direction: no sum is rounded before the maximum is taken off."""
    z = views(B, dtype)
    for temperature in (1e-3, 1e-5, 2e-6):
        for tau in (temperature, torch.tensor(temperature, dtype=torch.float64, device="cpu")):
            loss, gradients = outcome(lambda x, y, t=tau: fused_infonce(x, y, t, backend="cpu"), z, False)
            truth, _ = outcome(lambda x, y, t=temperature: fused_infonce(x, y, t, backend="reference"), z, True)
            assert abs(loss.double() - truth) <= max(BAND[dtype], 1e-6) * truth
            assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_similarities_that_are_not_normalised(backend):
    """As small as their temperature, and as large as a LayerNorm's output squares to."""
    x, y = views(8, torch.float32)
    got = fused_infonce(x * 1e-4, y * 1e-4, 1e-7, normalize=False, backend=backend)
    truth = fused_infonce(x.double() * 1e-4, y.double() * 1e-4, 1e-7, normalize=False, backend="reference")
    torch.testing.assert_close(got, truth.float(), rtol=1e-4, atol=1e-5)
    z = [torch.nn.functional.layer_norm(t, (768,)) for t in views(16, torch.float32, 768)]
    for keys in (z[1], z[1].roll(1, 0)):
        leaf = z[0].clone().requires_grad_()
        loss = fused_focal_infonce(leaf, keys, normalize=False, symmetric=True, backend=backend)
        loss.backward()
        truth = fused_focal_infonce(z[0].double(), keys.double(), normalize=False, symmetric=True, backend="reference")
        torch.testing.assert_close(loss.detach(), truth.float(), rtol=1e-5, atol=1e-4)
        assert leaf.grad.isfinite().all()


def test_dot_products_beyond_resolution_are_nan_and_no_number():
    """normalize=False: logits of 1e9 and more, whose rounding in float32 is hundreds of nats."""
    for B in (8, 150):
        x, y = (z * 1e6 for z in views(B, torch.float32))
        loss = fused_infonce(x, y, 0.05, normalize=False, reduction="none", backend="cpu")
        truth = fused_infonce(x.double(), y.double(), 0.05, normalize=False, reduction="none", backend="reference")
        assert (loss.isnan() | (abs(loss.double() - truth) <= 1e-5 * truth + 1e-3)).all()
