"""Drives CMake and lists the packages; everything else stands in pyproject.toml. Needs no torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """CUDA_HOME's compiler, or the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None) or shutil.which("nvcc")


def cuda_options() -> list[str]:
    """PYCSE_CUDA=1 asks for CUDA kernels, 0 leaves them out; by default they are built where nvcc is found."""
    wish = os.environ.get("PYCSE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"PYCSE_CUDA is {wish!r}; it may be 1 (CUDA kernels or an error), 0 (none) or unset")
    nvcc = find_nvcc()
    if wish == "1" and nvcc is None:
        raise SystemExit("PYCSE_CUDA=1 and no nvcc: put nvcc on PATH or set CUDA_HOME")
    if wish == "0" or nvcc is None:
        return ["-DPYCSE_CUDA=OFF"]
    # Where this is a script around nvcc, CMake asks the compiler itself for its toolkit.
    return ["-DPYCSE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install builds in a folder that is deleted; PYCSE_BUILD names one that stays.
        build = Path(os.environ.get("PYCSE_BUILD") or self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *cuda_options(),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


# kernels/ is installed as pycse.kernels (package-dir in pyproject.toml).
kernels = ["pycse.kernels", *(f"pycse.kernels.{name}" for name in find_packages("kernels"))]
setup(
    packages=[*find_packages(include=["pycse", "pycse.*"]), *kernels],
    ext_modules=[Extension("pycse.kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
