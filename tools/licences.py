"""Writes docs/licences.md: what pycse needs, with the licences that the installed packages say of themselves.

python tools/licences.py

Packages that an extra needs and that are not installed here are listed as such. It needs Python 3.11 or newer.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("triton", "train")  # beside the dependencies proper; test, bench and lint are for those who work on pycse
KNOWN = {"tomli": "MIT"}  # of packages that only some interpreters need
CLASSIFIER = "License :: "
SHORT = {  # what classifiers and texts say -> SPDX
    "MIT License": "MIT", "MIT": "MIT", "Apache Software License": "Apache-2.0", "Apache 2.0": "Apache-2.0",
    "Apache": "Apache-2.0", "Apache License 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0", "Apache License": "Apache-2.0",
    "BSD License": "BSD", "ISC License (ISCL)": "ISC", "Python Software Foundation License": "PSF-2.0",
}  # fmt: skip


def licence(name: str) -> str:
    """As a package's metadata has it: the expression, else the first line of its text, else its classifiers."""
    try:
        known = metadata(name)
    except PackageNotFoundError:
        return KNOWN.get(name, "(not installed here)")
    if expression := known.get("License-Expression"):
        return expression
    lines = (known.get("License") or "").strip().splitlines()
    if lines and re.search(r"[A-Za-z]", lines[0]) and len(lines[0]) <= 60 and "copyright" not in lines[0].lower():
        return SHORT.get(lines[0].strip(), lines[0].strip())
    found = [one.rsplit(" :: ", 1)[-1] for one in known.get_all("Classifier") or () if one.startswith(CLASSIFIER)]
    return " or ".join(SHORT.get(one, one) for one in found if one != "OSI Approved") or "(says none)"


def needed(requirements: list[str], found: dict[str, bool] | None = None, direct: bool = True) -> dict[str, bool]:
    """Package -> whether it is needed directly, of everything that the requirements pull in on this machine."""
    found = {} if found is None else found
    for text in requirements:
        one = Requirement(text)
        extras = [{"extra": extra} for extra in (*one.extras, "")]
        if not direct and one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(one.name)
        if name in found:
            found[name] = found[name] or direct
            continue
        found[name] = direct
        try:
            below = [Requirement(line) for line in requires(one.name) or ()]
        except PackageNotFoundError:
            continue
        wanted = [r for r in below if r.marker is None or any(r.marker.evaluate(extra) for extra in extras)]
        needed([f"{r.name}{'[' + ','.join(r.extras) + ']' if r.extras else ''}" for r in wanted], found, False)
    return found


def page() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"pycse-kernels": project["dependencies"]}
    groups |= {f"pycse-kernels[{extra}]": project["optional-dependencies"][extra] for extra in EXTRAS}
    lines = [
        "# Licences",
        "",
        "pycse is under Apache-2.0 (LICENSE). What it needs, as the packages say it of themselves; bold:",
        "needed directly, the others by those. `python tools/licences.py` writes this page, from what is installed.",
        "",
        "The training extras bring data too: all-MiniLM-L6-v2, whose authors give it under Apache-2.0 (the package",
        "that carries it says MIT), and with gensim's tests a part of English Wikipedia (CC BY-SA) and the documents",
        "and judgements of Lee, Pincombe & Welsh (2005).",
    ]
    seen: set[str] = set()
    for group, requirements in groups.items():
        rows = {name: direct for name, direct in needed(requirements).items() if direct or name not in seen}
        seen |= set(rows)
        lines += ["", f"## {group}", "", "| package | licence |", "|---|---|"]
        for name in sorted(rows, key=lambda name: (not rows[name], name)):
            shown = f"**{name}**" if rows[name] else name
            lines.append(f"| {shown} | {re.sub(r'[|]', '/', licence(name))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "licences.md").write_text(page(), encoding="utf-8")
