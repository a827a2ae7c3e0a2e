"""pycse's docstrings for the site: they speak to a terminal first, in reStructuredText's few marks."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

BLOCK = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 {4}.*\n|\n)+)", re.MULTILINE)
ROLE = re.compile(r":\w+:`~?([^`]+)`")
QUOTE = re.compile(r"(^ *|: )>", re.MULTILINE)  # "> 0, no unit" is no quotation
SECTIONS = {"Fields:": "Attributes:"}


def as_markdown(text: str) -> str:
    def fenced(match: re.Match[str]) -> str:
        code = textwrap.indent(textwrap.dedent(match[3]).strip("\n"), match[1])
        return f"{match[1]}```{match[2]}\n{code}\n{match[1]}```\n\n"

    text = BLOCK.sub(fenced, text + "\n").rstrip("\n")
    for ours, googles in SECTIONS.items():
        text = re.sub(rf"^( *){ours}$", rf"\1{googles}", text, flags=re.MULTILINE)
    text = QUOTE.sub(r"\1\\>", text)
    return ROLE.sub(r"``\1``", text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
