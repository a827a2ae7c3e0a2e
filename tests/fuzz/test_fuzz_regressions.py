"""What the fuzzer found, each fault by itself and as small as it goes. One that is not mended yet is marked
xfail(strict=True), and has its line in tests/fuzz/known.py: when it passes, both go."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pycse import alignment, fused_distill, fused_focal_infonce, fused_infonce, logsumexp_similarities, uniformity
from pycse.pattern import pack_mask
from pycse.sparse import SparseLinear, masked_linear
from pycse.sparse.storage import saved_masks

BACKENDS = ["cpu", "torch"]


def points(rows=4, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


ZERO = {
    "z1": "fused_infonce(zero(4, 6), torch.randn(4, 6), backend=backend)",
    "z2": "fused_focal_infonce(torch.randn(4, 6), zero(4, 6), backend=backend)",
    "x of uniformity": "uniformity(zero(4, 6), backend=backend)",
    "y of alignment": "alignment(torch.randn(4, 6), zero(4, 6), backend=backend)",
    "teachers": "fused_distill(torch.randn(4, 6), [zero(4, 5)], seed=0, backend=backend)",
    "weight": "fused_infonce(torch.randn(4, 6), torch.randn(4, 6), weight=zero(4), reduction='sum', backend=backend)",
    "upstream": "torch.autograd.grad(fused_infonce(z, z.detach(), reduction='none', backend=backend), z, zero(4))",
    "x of masked_linear": "masked_linear(zero(4, 6), torch.randn(5, 6), torch.ones(5, 6).bool(), backend=backend)",
    "x of SparseLinear": "SparseLinear(6, 5, pattern='unstructured', backend=backend).eval()(zero(4, 6))",
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tensors_have_no_memory(backend):
    """The address of torch._efficientzerotensor's data is 0; autograd makes such tensors for gradients that are 0."""
    code = f"""
import torch
from pycse import alignment, fused_distill, fused_focal_infonce, fused_infonce, uniformity
from pycse.sparse import SparseLinear, masked_linear
backend, z = {backend!r}, torch.randn(4, 6, requires_grad=True)
zero = lambda *shape: torch._efficientzerotensor(shape)
for name, call in {ZERO!r}.items():
    print(name, flush=True)
    with torch.set_grad_enabled(name == "upstream"):
        result = eval(call)
    assert all(t.isfinite().all() for t in (result if isinstance(result, tuple) else (result,)))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, (
        f"exit {result.returncode} in {result.stdout.splitlines()[-1:]}: {result.stderr[-400:]}"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sign_of_an_upstream_gradient_stands_in_a_flag(backend):
    z, other = points().requires_grad_(), points(seed=1)
    upstream = torch.linspace(0.5, 2, 4)
    made = [
        torch.autograd.grad(fused_focal_infonce(z, other, reduction="none", backend=backend), z, u)[0]
        for u in (upstream, torch._neg_view(-upstream))
    ]
    torch.testing.assert_close(made[1], made[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("negative", ["x", "weight", "bias"])
def test_the_sign_of_a_layers_input_stands_in_a_flag(negative, grad, backend):
    given = {"x": points(), "weight": points(5, 6, 1), "bias": points(1, 5, 2)[0]}
    mask = points(5, 6, 3) > 0
    expected = F.linear(given["x"], given["weight"] * mask, given["bias"])
    given[negative] = torch._neg_view(-given[negative])
    with torch.set_grad_enabled(grad):
        given["x"].requires_grad_(grad and not given["x"].is_neg())
        y = masked_linear(given["x"], given["weight"], mask, given["bias"], backend=backend)
        torch.testing.assert_close(y, expected)
        if negative == "x":
            layer = SparseLinear(6, 5, mask=mask, pattern="unstructured", backend=backend).eval()
            with torch.no_grad():
                layer.weight.copy_(given["weight"] * mask)
                layer.bias.copy_(given["bias"])
            torch.testing.assert_close(layer(given["x"]), expected)


@pytest.mark.parametrize(
    "dtype, backend",
    [(torch.bfloat16, "cpu"), (torch.bfloat16, "torch"), (torch.float16, "cpu"), (torch.float16, "torch")],
)
def test_backward_of_masked_linear_under_autocast(dtype, backend):
    x, weight, mask = points().requires_grad_(), points(5, 6, 1).requires_grad_(), points(5, 6, 3) > 0
    with torch.autocast("cpu", dtype):
        y = masked_linear(x, weight, mask, backend=backend)
        dx, dw = torch.autograd.grad(y.float().sum(), (x, weight))
    torch.testing.assert_close(dx, (weight * mask).sum(0).expand(4, 6), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dw, x.sum(0) * mask, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_inside_inference_mode(backend):
    """F.linear gives them there for tensors made outside, so what is made of the mask must not be in the way."""
    x, weight, mask = points().requires_grad_(), points(5, 6, 1).requires_grad_(), points(5, 6, 3) > 0
    with torch.inference_mode(), torch.enable_grad():
        y = masked_linear(x, weight, mask, backend=backend)
    torch.testing.assert_close(y.detach(), F.linear(x, weight * mask).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_loss_inside_inference_mode(backend):
    """Positives of another integer type become int64 there, and that must not be in the way either."""
    z = points().requires_grad_()
    with torch.inference_mode(), torch.enable_grad():
        loss = fused_infonce(z, points(seed=1), positives=torch.arange(4).int(), backend=backend)
    assert loss.item() > 0


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_the_mean_of_two_probabilities_that_underflow(backend):
    """q_3 is the smallest number that float32 has, and p_3 is 0: half of their sum is 0 as well."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]], requires_grad=True)
    logits = torch.tensor([[0.0, 0.0, -103.2], [0.0, 0.0, -103.2], [0.0, -103.2, 0.0]])
    loss = fused_distill(
        z, teacher_logits=logits, divergence="js", student_temperature=0.005, teacher_temperature=1.0, shuffle="none",
        reduction="none", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 0.3643]), rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch"])
def test_packed_masks_of_one_word_a_row_that_are_strided(backend):
    """A matrix of one number is contiguous whatever its strides, and a view of its bytes is not."""
    mask = torch.ones(1, 6).bool()
    bits = torch.zeros(1, 2, dtype=torch.int32)[:, ::2].copy_(pack_mask(mask))
    x, weight = points(), points(1, 6, 1)
    torch.testing.assert_close(masked_linear(x, weight, bits, backend=backend), F.linear(x, weight))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["torch"])  # in the native kernels an infinite similarity makes its row NaN
def test_a_logit_of_minus_infinity_is_no_nan(backend, value):
    """An infinite key that points away from a row leaves the row's loss as it is, as in eager PyTorch."""
    z1 = torch.tensor([[1.0], [-1.0], [2.0]])
    z2 = torch.tensor([[1.0], [-1.0], [2.0], [value]])
    loss = [fused_infonce(z1, z2, 1.0, normalize=False, reduction="none", backend=b) for b in ("reference", backend)]
    assert torch.equal(loss[1].isfinite(), loss[0].isfinite())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_float16_weights_survive_a_small_upstream_gradient(backend):
    """Rows' losses beyond 65504, times 0.001, are no infinity: gradients of float16 wait for the upstream gradient."""
    z, weight = points(), torch.ones(4, dtype=torch.float16, requires_grad=True)
    loss = fused_infonce(z, -z, 1e-5, weight=weight, reduction="sum", backend=backend)
    (g,) = torch.autograd.grad(loss, weight, torch.tensor(1e-3))
    torch.testing.assert_close(g, (fused_infonce(z, -z, 1e-5, reduction="none") * 1e-3).half())


def test_damaged_safetensors_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"0.mask_bits": pack_mask(torch.ones(4, 5).bool())}, path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        saved_masks(tmp_path)


Z = points()
NESTED = torch.nested.nested_tensor([Z[0], Z[1]])
REFUSED = {
    "nested z1": (lambda: fused_infonce(NESTED, Z), "z1"),
    "nested x": (lambda: uniformity(NESTED), "x"),
    "nested y": (lambda: alignment(Z, NESTED), "y"),
    "nested z1 of log-sums": (lambda: logsumexp_similarities(NESTED, Z), "z1"),
    "large temperature": (lambda: fused_infonce(Z, Z, 10**400), "temperature"),
    "large t": (lambda: uniformity(Z, 10**400), "t must"),
    "large student_temperature": (lambda: fused_distill(Z, [Z], student_temperature=10**400), "student_temperature"),
    "array temperature": (lambda: fused_infonce(Z, Z, np.ones(2)), "temperature"),
    "array group_p": (lambda: fused_distill(Z, [Z], group_p=np.ones(2)), "group_p"),
    "sparse weight": (lambda: fused_infonce(Z, Z, weight=torch.ones(4).to_sparse()), "weight"),
    "sparse positives": (lambda: fused_infonce(Z, Z, positives=torch.arange(4).to_sparse()), "positives"),
    "sparse teacher_logits": (lambda: fused_distill(Z, teacher_logits=torch.ones(4, 4).to_sparse()), "teacher_logits"),
    "sparse mask": (lambda: masked_linear(Z, points(5, 6), torch.ones(5, 6).bool().to_sparse()), "mask"),
    "sparse mask of a layer": (lambda: SparseLinear(6, 5, mask=torch.ones(5, 6).bool().to_sparse()), "mask"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_refused_by_name(which):
    call, name = REFUSED[which]
    with pytest.raises((TypeError, ValueError), match=name):
        call()
