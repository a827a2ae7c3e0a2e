"""The Triton backend of AdapACSE against the float64 reference.

As test_triton.py: on a CUDA GPU where there is one, and in any case once more in a process of its own with
TRITON_INTERPRET=1 on CPU tensors. That the kernels compile is tests/helpers/triton_compile.py's, which test_triton.py runs.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

import angular_pairs
from angular_pairs import Angles, check
from interpreter import CUDA, INTERPRETED, run_interpreted

from pycse import fused_adapacse
from pycse.panels import contrastive as panel
from pycse.problem import Angular


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, 50)


DTYPES = [torch.float32, torch.float64, torch.float16] + ([torch.bfloat16] if CUDA else [])

# The interpreter is slow: rows of few keys, half the table in the first type and a few cases in the others.
SMALL = [c for c in angular_pairs.ALL if (c.N or c.B) <= 100]
TABLE = [(c, DTYPES[0]) for c in SMALL[:: 1 if CUDA else 2]] + [(c, d) for d in DTYPES[1:] for c in SMALL[1::5]]


@pytest.mark.parametrize("case, dtype", TABLE, ids=str)
def test_against_the_reference(case, dtype, device):
    check(case, "triton", dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Angles(14, 40, m=1.0), Angles(14, 2100, 8, m=1.0, trained=True)], ids=str)
def test_panels_of_13_rows(case, dtype, device, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, "triton", dtype, device)


def test_bad_values_that_nobody_reads_give_nan(device):
    """Positives that are no keys, and a temperature that is not positive: NaN, and nothing is written out of bounds."""
    from pycse.backends.triton.adapacse import adapacse

    z, alpha = torch.randn(6, 8, device=device), torch.rand(6, 6, device=device)
    bad = torch.tensor([0, 1, 6, -1, 4, 5], device=device)
    p = Angular(z, z, 0.1, guide_logits=alpha, positives=bad)
    assert adapacse(p).rows.isnan().tolist() == [False, False, True, True, False, False]
    p = Angular(z, z, torch.tensor(-1.0, device=device), guide_logits=alpha)
    assert adapacse(p).rows.isnan().all()


def test_forward_alone(device):
    z1, z2 = (z.float().to(device) for z in Angles(20, 40).embeddings(torch.float32))
    alpha = torch.rand(20, 40, device=device)
    with torch.no_grad():
        loss = fused_adapacse(z1, z2, guide_logits=alpha, backend="triton")
    torch.testing.assert_close(loss, fused_adapacse(z1, z2, guide_logits=alpha, backend="reference"))
