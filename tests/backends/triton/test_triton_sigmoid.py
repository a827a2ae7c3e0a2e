"""The Triton backend of the sigmoid loss against the float64 reference.

As test_triton.py: on a CUDA GPU where there is one, and in any case once more in a process of its own with
TRITON_INTERPRET=1 on CPU tensors. That the kernels compile is tests/helpers/triton_compile.py's, which test_triton.py runs.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

import sigmoid_pairs
from interpreter import CUDA, INTERPRETED, run_interpreted
from sigmoid_pairs import Pairs, check

from pycse import fused_sigmoid
from pycse.panels import contrastive as panel
from pycse.problem import Sigmoid


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, 100)


DTYPES = [torch.float32, torch.float64, torch.float16] + ([torch.bfloat16] if CUDA else [])


# The whole table in the first type, a third of it in the others: what differs between them are loads and stores.
TABLE = [(c, DTYPES[0]) for c in sigmoid_pairs.ALL] + [(c, d) for d in DTYPES[1:] for c in sigmoid_pairs.ALL[::3]]


@pytest.mark.parametrize("case, dtype", TABLE, ids=str)
def test_against_the_reference(case, dtype, device):
    check(case, "triton", dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*sigmoid_pairs.POSITIVES, Pairs(64, 2100, 8, trained=True)], ids=str)
def test_panels_of_13_rows(case, dtype, device, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, "triton", dtype, device)


def test_bad_values_that_nobody_reads_give_nan(device):
    """Positives that are no keys, and a scale that is not positive: NaN, and nothing is written out of bounds."""
    from pycse.backends.triton.sigmoid import sigmoid

    z = torch.randn(6, 8, device=device)
    p = Sigmoid(z, z, 10.0, -10.0, positives=torch.tensor([0, 1, 6, -1, 4, 5], device=device))
    assert sigmoid(p).rows.isnan().tolist() == [False, False, True, True, False, False]
    p = Sigmoid(z, z, torch.tensor(-1.0, device=device), 0.0)
    assert sigmoid(p).rows.isnan().all()


def test_forward_alone(device):
    z1, z2 = (z.float().to(device) for z in Pairs(20, 40).embeddings(torch.float32))
    with torch.no_grad():
        loss = fused_sigmoid(z1, z2, backend="triton")
    torch.testing.assert_close(loss, fused_sigmoid(z1, z2, backend="reference"))
