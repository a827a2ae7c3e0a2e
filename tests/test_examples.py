# ruff: noqa: F811 (fixtures are arguments)
"""Every script of examples/ on a tiny model: it runs as people run it, saves an encoder that loads, and has a page."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import needs_extras, tiny_model  # noqa: F401 (a fixture)

import pycse

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROCESSES = "several_processes.py"
# What a script prints last, in its own words; a Trainer says what it logged.
SAYS = {
    "plain_pytorch.py": "step 2: loss ",
    "with_sentence_transformers.py": "'train_loss': ",
    "with_transformers.py": "'train_loss': ",
    "distil_then_sparsify.py": "(32,)",
    "static_matryoshka.py": "32 numbers a text: alike ",
    PROCESSES: "step 2: loss of 8 rows ",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ("red", "old", "big"), ("cat", "dog", "ox", "hen"), ("house", "barn")
    path.write_text("".join(f"the {a} {b} is in the {c}\n" for a in words[0] for b in words[1] for c in words[2]))
    return path


def arguments(path: Path, model: str, text: Path, out: Path) -> list[str]:
    return [str(path), "--model", model, "--text", str(text), "--batch-size", "4", "--steps", "2", "--out", str(out)]


@needs_extras
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name != PROCESSES], ids=lambda path: path.stem)
def test_it_runs(path, tiny_model, text, tmp_path, monkeypatch, capsys):
    """In this process, which has imported what they import."""
    monkeypatch.setattr(sys, "argv", arguments(path, tiny_model, text, tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.name] in capsys.readouterr().out
    assert_loads(tmp_path)


@needs_extras
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo, by which processes on a CPU speak",
)
def test_it_runs_on_two_processes(tiny_model, text, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(Path(pycse.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "HF_HUB_OFFLINE": "1",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, *arguments(ROOT / "examples" / PROCESSES, tiny_model, text, tmp_path / "out")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(SAYS[PROCESSES]) == 1, done.stdout
    assert_loads(tmp_path)


def assert_loads(folder: Path) -> None:
    """The only thing that the script left is an encoder."""
    from sentence_transformers import SentenceTransformer

    assert [path.name for path in folder.iterdir()] == ["out"]
    z = SentenceTransformer(str(folder / "out"), device="cpu").encode("the cat is old")
    assert z.ndim == 1 and abs(z).sum() > 0 and abs(z).max() < 100


def test_each_is_the_page_of_a_tutorial():
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert EXAMPLES
    for path in EXAMPLES:
        assert [page for page, words in pages.items() if f'--8<-- "examples/{path.name}"' in words], path.name
