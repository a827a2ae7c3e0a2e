"""The Triton backend of losses at several lengths against the float64 reference.

As test_triton.py: on a CUDA GPU where there is one, and in any case once more in a process of its own with
TRITON_INTERPRET=1 on CPU tensors. That the kernels compile is tests/helpers/triton_compile.py's, which test_triton.py runs.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

from interpreter import CUDA, INTERPRETED, run_interpreted

from pycse import fused_infonce
from pycse.backends.triton import prefixes as backend
from pycse.panels import prefixes as panel

from cases import MATRYOSHKA
from oracle import Case, check


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, 25)


DTYPES = [torch.float32, torch.float64, torch.float16] + ([torch.bfloat16] if CUDA else [])
# What the CPU's tests have each of: a case takes seconds in the interpreter.
TABLE = [(c, DTYPES[0]) for c in MATRYOSHKA[1::2]] + [(c, d) for d in DTYPES[1:] for c in MATRYOSHKA[::6]]


@pytest.mark.parametrize("case, dtype", TABLE, ids=str)
def test_against_the_reference(case, dtype, device):
    check(case, "triton", dtype, device)


@pytest.mark.parametrize("case", [MATRYOSHKA[2], MATRYOSHKA[3], *MATRYOSHKA[-8:-6]], ids=str)
def test_panels_of_13_rows_and_columns_summed_by_4(case, device, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda p, K: min(13, p.mine.stop - p.mine.start))
    monkeypatch.setattr(backend, "ROWS", 4)
    check(case, "triton", torch.float32, device)


def test_one_pass_over_the_panels_for_all_lengths(device, monkeypatch):
    visits = []
    original = backend.Kernels.visit
    monkeypatch.setattr(backend.Kernels, "visit", lambda self, *given: visits.append(1) or original(self, *given))
    z1, z2 = (z.float().to(device).requires_grad_() for z in Case(20, 40, 24).embeddings())
    fused_infonce(z1, z2, dims=[24, 12, 6], backend="triton").backward()
    assert len(visits) == 1


def test_a_bad_positive_gives_nan_in_its_row(device):
    z = torch.randn(6, 8, device=device)
    positives = torch.tensor([0, 1, 6, -1, 4, 5], device=device)
    from pycse.backends.triton.contrastive import contrastive
    from pycse.problem import Contrastive, Lengths, Needs

    p = Contrastive(z, z, 0.05, positives=positives, needs=Needs(True, True))
    result, rows = panel.matryoshka(p, Lengths([8, 3], [1.0, 1.0]), contrastive, backend.Kernels, False)
    for losses in (result.rows, *rows):
        assert losses.isnan().tolist() == [False, False, True, True, False, False]
