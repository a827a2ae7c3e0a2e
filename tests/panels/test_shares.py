"""Rows that processes share, by each backend that runs here; tests/distributed has the processes."""

import emulation
import pytest
import shares
import torch

from pycse.backends.cpu import contrastive as cpu
from pycse.backends.cpu import distill as cpu_distill
from pycse.backends.cuda import contrastive as cuda
from pycse.backends.cuda import distill as cuda_distill
from pycse.panels import contrastive as panel
from pycse.panels import distill as distillation


@pytest.mark.parametrize("panels", ["one", "several"])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", shares.NAMES)
def test_shares_add_up(name, backend, panels, monkeypatch):
    if panels == "several":
        monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 3))
        monkeypatch.setattr("pycse.panels.parts.panel_rows", lambda B, *_: min(B, 3))
        monkeypatch.setattr(distillation, "panel_rows", lambda d, *_: min(3, d.mine.stop - d.mine.start))
    for dtype in (torch.float32, torch.float64):
        shares.check(name, backend, dtype, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_uniformity_adds_up(backend):
    for dtype in (torch.float32, torch.float64):
        shares.check_uniformity(backend, dtype, "cpu")


class Emulated(cuda.Kernels):
    @staticmethod
    def native():
        return emulation.kernels()


class EmulatedDistillation(cuda_distill.Kernels):
    @staticmethod
    def native():
        return emulation.kernels()


@pytest.mark.parametrize("name", ["hard negatives", "thresholds"])
def test_shares_of_cuda_kernels(name, monkeypatch):
    emulation.instead(monkeypatch, cpu, "contrastive", lambda p: panel.contrastive(p, Emulated))
    shares.check(name, "cpu", torch.float32, "cpu")


def test_shares_of_the_cuda_distillation(monkeypatch):
    emulation.instead(monkeypatch, cpu_distill, "distill", lambda d: distillation.distill(d, EmulatedDistillation))
    shares.check("distillation", "cpu", torch.float32, "cpu")
