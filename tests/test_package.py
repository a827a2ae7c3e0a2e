"""The package as installed: fresh processes with parts missing, one OpenMP runtime, a clean binary."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pycse.kernels import native

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, tmp_path: Path, **env: str) -> str:
    """Runs code in a fresh process outside the checkout and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r}: raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by a test)", name=name)
sys.meta_path.insert(0, Block())
"""

USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, pycse
    z = torch.randn(5, 8, requires_grad=True)
    for _ in range(2): pycse.fused_focal_infonce(z, z.detach()).backward()
print([str(w.message) for w in caught if "pycse" in str(w.message)])
print(pycse.info())
"""


def test_without_triton(tmp_path):
    out = python(BLOCK.format(blocked=["triton"]) + USE, tmp_path)
    assert out.startswith("[]")


def test_importing_waits_for_torch(tmp_path):
    code = "import sys, pycse; print('torch' in sys.modules); pycse.fused_infonce; print(pycse.info.__module__, dir(pycse))"
    first, rest = python(code, tmp_path).splitlines()
    assert first == "False" and rest.startswith("pycse.report") and "logsumexp_similarities" in rest


def test_what_is_named_comes_from_somewhere():
    import pycse

    assert sorted(name for names in pycse.MODULES.values() for name in names) == pycse.__all__
    with pytest.raises(AttributeError, match="no attribute 'fused_everything'"):
        pycse.fused_everything  # noqa: B018


def test_importing_loads_nothing_heavy(tmp_path):
    code = "import torch; before = set(__import__('sys').modules); import pycse; print(*set(__import__('sys').modules) - before)"
    loaded = python(code, tmp_path).split()
    heavy = ("triton", "typer", "rich", "transformers", "sentence_transformers", "matplotlib", "numpy", "pycse.kernels")
    assert "pycse.functional" in loaded
    assert not [name for name in loaded if name.startswith(heavy)]


def test_without_the_native_module_auto_warns_once_and_works(tmp_path):
    out = python(BLOCK.format(blocked=["pycse.kernels._native"]) + USE, tmp_path)
    warnings = eval(out.splitlines()[0])
    assert len(warnings) == 1
    assert "slower 'torch' backend" in warnings[0] and "pip install -e ." in warnings[0]
    assert "backend cpu" in out and "auto on cpu" in out


def test_without_the_native_module_a_named_backend_raises(tmp_path):
    code = BLOCK.format(blocked=["pycse.kernels._native"]) + (
        "import torch, pycse\n"
        "try: pycse.fused_focal_infonce(torch.randn(5, 8), torch.randn(5, 8), backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "backend='cpu' cannot run here" in python(code, tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_and_it_is_torchs(tmp_path):
    code = (
        "import torch; from pycse.kernels import native; native()\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line})"
    )
    mapped = python(code, tmp_path).split()
    assert len(mapped) == 1 and "torch" in mapped[0], mapped


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the module is linked with its runtime")
def test_the_module_names_no_openmp_runtime():
    """torch's has another name in each wheel, and the system's would be loaded beside it."""
    assert b"libgomp" not in binary()


def test_torchs_thread_count_is_used(tmp_path):
    code = (
        "import torch, os; torch.set_num_threads(1); import pycse\n"
        "z = torch.randn(300, 64, requires_grad=True)\n"
        "pycse.fused_focal_infonce(z, z.detach(), backend='cpu').backward()\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    base = "import torch, os; torch.set_num_threads(1); z = torch.randn(300, 64); (z @ z.T).sum(); print(len(os.listdir('/proc/self/task')))"
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    assert int(python(code, tmp_path)) <= int(python(base, tmp_path)) + 1  # autograd's own thread


def test_an_unknown_instruction_set_is_named(tmp_path):
    code = (
        "import torch, pycse\n"
        "try: pycse.fused_focal_infonce(torch.randn(5, 8), torch.randn(5, 8), backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    out = python(code, tmp_path, PYCSE_CPU_ISA="sse9")
    assert "sse9" in out and "portable" in out


def test_info_names_every_backend():
    import pycse

    text = str(pycse.info())
    for name in ("reference", "torch", "cpu", "triton", "cuda"):
        assert f"backend {name}" in text


def binary() -> bytes:
    native()
    from pycse.kernels import _native

    return Path(_native.__file__).read_bytes()


def test_no_absolute_path_in_the_binary():
    content = binary()
    for path in {str(ROOT), str(Path.home()), sys.prefix}:
        if len(path) > 5:
            assert path.encode() not in content, path


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_instruction_sets_share_no_code(tmp_path):
    """An inline function that two of them compile is kept once by the linker: it could be the one this CPU cannot
    run."""
    source, target = ROOT / "kernels" / "cpu" / "isa.cpp", tmp_path / "isa.o"
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-DPYCSE_ISA=probe"]
    subprocess.run(["g++", *flags, "-c", source, "-o", target], check=True)
    symbols = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [s for s in symbols if " W " in s]
    assert weak and not [s for s in weak if "pycse::probe::" not in s]


def test_a_gil_release_lets_python_run():
    import threading
    import time

    import torch

    from pycse import fused_focal_infonce

    z = torch.randn(3000, 64)
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.01)
    before = ticks[0]
    for _ in range(5):
        fused_focal_infonce(z, z, backend="cpu")
    stop.set()
    thread.join()
    assert ticks[0] > before


def test_no_backend_imports_another():
    """An error in what they shared would be in the oracle too, and no test would see it."""
    folder = ROOT / "pycse" / "backends"
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0]
        for name in re.findall(r"^\s*(?:from|import) pycse\.backends\.(\w+)", path.read_text(encoding="utf-8"), re.M):
            assert name in (own, "addresses", "forks") or not (folder / name).is_dir(), f"{path} imports {name}"


# From low to high: what is imported stands in an earlier line than the importer, or in its own. Modules that are not
# named are plain: they know no kernels. pycse/__init__.py imports what is public, and nothing imports it.
LAYERS = (
    "choices problem transforms grouping validation pattern",
    "kernels",
    "backends panels",
    "ops",
    "distributed",
    "adapacse functional distillation hypersphere log_sums losses matryoshka report sigmoid sparse supervised",
    "sentence_transformers",
    "training",
    "cli",
    "__init__ __main__",
)


def modules() -> dict[str, Path]:
    """Name -> source of every module of the package; a package's name is its __init__'s."""
    found = {}
    for package, folder in (("pycse", ROOT / "pycse"), ("pycse.kernels", ROOT / "kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(tree: ast.AST) -> list[tuple[str, str | None]]:
    """(module, name taken from it or None) of every import of pycse's, in functions too, but not for types alone."""
    found: list[tuple[str, str | None]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the whole name"
            found += [(str(node.module), alias.name) for alias in node.names]
        else:
            found += imported(node)
    return [one for one in found if one[0].split(".")[0] == "pycse"]


def import_graph() -> dict[str, set[str]]:
    known = modules()
    graph = {}
    for module, path in known.items():
        taken = imported(ast.parse(path.read_text(encoding="utf-8")))
        graph[module] = {f"{of}.{name}" if f"{of}.{name}" in known else of for of, name in taken} - {module}
    return graph


def packages(module: str) -> set[str]:
    """The packages that a module is in, whose __init__ runs before it."""
    parts = module.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}


def layer(module: str) -> int:
    part = [*module.split("."), "__init__"][1]
    return next((k for k, line in enumerate(LAYERS) if part in line.split()), 0)


def test_imports_are_not_circular():
    """Whichever module is imported first, the others are complete when it reads them."""
    graph = {}
    for module, targets in import_graph().items():
        # Importing a module runs the __init__ of its packages; those of one's own have begun before.
        runs = targets | set().union(*map(packages, targets))
        graph[module] = runs - packages(module) - {module} | targets
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_imports_go_down_the_layers():
    wrong = {
        (module, target)
        for module, targets in import_graph().items()
        for target in targets
        if layer(target) > layer(module) or target in packages(module)
    }
    assert sorted(wrong) == [], "they go up, or to the importer's own package"
