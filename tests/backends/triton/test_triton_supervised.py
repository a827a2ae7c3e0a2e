"""The Triton backend of the supervised contrastive loss against the float64 reference.

As test_triton.py: on a CUDA GPU where there is one, and in any case once more in a process of its own with
TRITON_INTERPRET=1 on CPU tensors. That the kernels compile is tests/helpers/triton_compile.py's, which test_triton.py
runs.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

import labelled
from interpreter import CUDA, INTERPRETED, run_interpreted
from labelled import Labelled, check

from pycse import fused_supcon
from pycse.panels import contrastive as panel
from pycse.problem import Supervised


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, 50)


DTYPES = [torch.float64, torch.float32] + ([torch.bfloat16, torch.float16] if CUDA else [])
# The interpreter takes a tenth of a second a row: some of the cases.
SMALL = [case for case in labelled.ALL if case.B <= 20]
CASES = labelled.ALL if CUDA else [*SMALL[:4], *SMALL[5:8], *SMALL[8::3]]


@pytest.mark.parametrize("inside", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, dtype, inside, device):
    check(case, inside, "triton", dtype, device)


@pytest.mark.parametrize("inside", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("case", [Labelled(16, trained=True), Labelled(3, 2100, 8)], ids=str)
def test_panels_of_13_rows(case, inside, device, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, inside, "triton", torch.float32, device)


def test_a_temperature_that_nobody_reads_gives_nan(device):
    from pycse.backends.triton.supervised import supervised

    z, ids = torch.randn(6, 8, device=device), torch.arange(6, device=device) // 2
    assert supervised(Supervised(z, z, torch.tensor(-1.0, device=device), None, ids)).rows.isnan().all()


def test_forward_alone(device):
    z1, ids1, z2, ids2 = (t.to(device) for t in Labelled(20, 40).tensors(torch.float32))
    with torch.no_grad():
        loss = fused_supcon(z1.float(), ids1, z2.float(), ids2, backend="triton")
    torch.testing.assert_close(loss, fused_supcon(z1.float(), ids1, z2.float(), ids2, backend="reference"))
