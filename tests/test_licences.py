"""docs/licences.md has a line for everything that pycse needs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")


def test_every_dependency_has_its_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9-]+", requirement)[0]
        assert re.search(rf"^\| \*\*{name}\*\* \| [A-Za-z].*\|$", page, re.M), f"{name}: run python tools/licences.py"
