"""The oracle itself: gradcheck to second order, closed forms, and agreement with plain cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pycse import fused_focal_infonce, fused_infonce

from oracle import Case


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True},
        {"hard_negative_weight": 0.8},
        {"exclude_above": -0.3},
        {"query_ids": torch.tensor([0, 1, 0, 2]), "key_ids": torch.tensor([0, 1, 0, 2])},
        {"reduction": "none"},
        {"normalize": False},
    ],
    ids=lambda o: "+".join(o) or "plain",
)
def test_gradcheck(options):
    g = torch.Generator().manual_seed(1)
    N = 8 if "hard_negative_weight" in options else 4
    z1 = torch.randn(4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    z2 = torch.randn(N, 6, generator=g, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    m = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, generator=g, dtype=torch.float64).add_(0.5).requires_grad_()

    def loss(z1, z2, tau, m, weight):
        return fused_focal_infonce(z1, z2, tau, m, weight=weight, backend="reference", **options)

    assert torch.autograd.gradcheck(loss, (z1, z2, tau, m, weight))
    assert torch.autograd.gradgradcheck(loss, (z1, z2, tau, m, weight))


def test_infonce_is_cross_entropy_of_cosines():
    z1, z2 = Case(20, 35, 16).embeddings()
    logits = F.cosine_similarity(z1[:, None], z2[None], dim=-1) / 0.07
    expected = F.cross_entropy(logits, torch.arange(20))
    torch.testing.assert_close(fused_infonce(z1, z2, 0.07, backend="reference"), expected)


def test_closed_forms():
    # Orthonormal rows: s = identity, so l_ii = 1/tau and l_ij = 0.
    eye = torch.eye(5, dtype=torch.float64)
    expected = math.log1p(4 * math.exp(-1 / 0.5))
    for loss in (fused_focal_infonce(eye, eye, 0.5, 0.3), fused_infonce(eye, eye, 0.5)):
        assert abs(loss.item() - expected) < 1e-12
    # Identical rows: s = 1 everywhere; focal's negatives weigh exp(m / tau) more than the positive.
    ones = torch.ones(5, 3, dtype=torch.float64)
    assert abs(fused_infonce(ones, ones, 0.5).item() - math.log(5)) < 1e-12
    assert abs(fused_focal_infonce(ones, ones, 0.5, 0.3).item() - math.log1p(4 * math.exp(0.3 / 0.5))) < 1e-12


def test_symmetric_is_the_mean_of_both_directions():
    z1, z2 = Case(20).embeddings()
    both = (fused_focal_infonce(z1, z2) + fused_focal_infonce(z2, z1)) / 2
    torch.testing.assert_close(fused_focal_infonce(z1, z2, symmetric=True, backend="reference"), both)
