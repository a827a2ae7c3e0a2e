"""benchmarks/gpu.sh and what it runs, rehearsed on a machine that needs no GPU: the first minute on one is not for
typos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_parts
from pycse.problem import Contrastive

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "TRITON_INTERPRET": "0", **env},
        capture_output=True,
        text=True,
    )


def test_dry_run(tmp_path):
    done = script("--dry-run", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("gpu-dry-run-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == list(gpu.ROWS)
    assert not {name: row["error"] for name, row in rows.items() if "error" in row}
    text = file.with_suffix(".md").read_text()
    assert "Dry run" in text
    measured = [line.split("|")[4].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert measured.count("not measured") <= 4  # the peers that are no requirement of the package, and torch.compile


def test_an_unknown_argument_is_refused(tmp_path):
    done = script("--fast", OUT=str(tmp_path))
    assert done.returncode == 2 and "--check-only" in done.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = script(OUT=str(tmp_path))
    assert done.returncode == 1 and "No GPU is available" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_row_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    def fails(plan: gpu.Plan) -> dict[str, object]:
        raise AssertionError("off")

    monkeypatch.setattr(gpu, "ROWS", {"first": fails, "ceilings": gpu.ceilings})
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--out", str(tmp_path)])
    assert gpu.main() == 1
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert rows["first"]["error"] == "AssertionError: off" and "product TF/s" in rows["ceilings"]


def test_every_way_of_the_cuda_backend_is_taken():
    """Measured and checked with the sanitizer: a default would hide the kernels that are off or for other sizes."""
    from pycse.backends.cuda import contrastive as cuda

    seen = []
    for settings in gpu_parts.routes("cuda").values():
        with settings():
            seen.append((cuda.FUSED, cuda.fits(Contrastive(*torch.randn(2, 68, 40), 0.05, 0.3, True))))
    assert seen == [(0, True), (0, False), (1, False), (2, False)] and cuda.FUSED == 0


def module(name: str, **members: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


def clip(temperature: float, normalized_inputs: bool, stable: bool):
    assert not normalized_inputs and not stable
    return lambda a, b: gpu_parts.eager(a, b, focal=False, symmetric=True)


def flash(q: torch.Tensor, k: torch.Tensor, scale: float, head_dim: int) -> torch.Tensor:
    assert q.shape[1] % head_dim == 0
    labels = torch.arange(len(q))
    return torch.nn.functional.cross_entropy((scale * q @ k.t()).float(), labels, reduction="none")


def sigmoid(a: torch.Tensor, b: torch.Tensor, log_temperature: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    l = log_temperature.exp() * (a @ b.t()).float() + bias
    return -torch.nn.functional.logsigmoid(torch.where(torch.eye(len(a)) > 0, l, -l)).sum() / len(a)


PEERS = {
    "memeff": module("memeff", MemoryEfficientCLIPLoss=clip),
    "inf_cl": module("inf_cl", cal_flash_loss=flash),
    "siglip_kernel": module("siglip_kernel", fused_siglip_loss=sigmoid),
}


@pytest.mark.parametrize("name", ["siglip-kernel", "memeff", "inf-cl"])
def test_peers_are_called_as_their_interfaces_ask(name, monkeypatch):
    """The packages need a GPU: in their place, their losses in plain PyTorch under their names and arguments."""
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), PEERS[name.replace("-", "_")])
    row = gpu_parts.beside(gpu.Plan(dry=True), name)
    assert row["parity"] < 3e-2 and all(size["ratio"] > 0 for size in row["sizes"].values())


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "inf_cl", module("inf_cl", cal_flash_loss=lambda *a, **k: 2 * flash(*a, **k)))
    with pytest.raises(AssertionError, match="inf-cl is off by"):
        gpu_parts.beside(gpu.Plan(dry=True), "inf-cl")
