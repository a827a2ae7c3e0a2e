"""A setting that is also an option of the command line: a dataclass field that carries its help.

Nothing heavy is imported here: `pycse --help` reads it.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
KEY = "option"


@dataclass(frozen=True)
class Option:
    """How a setting is written and explained.

    Fields:
        help: in `pycse train --help`.
        flag: its name after --, where that is not the field's with hyphens.
        metavar: the value in the help; default: the type.
        sparsify: help in `pycse sparsify --help`; None where the setting belongs to training alone.
        path: whether the value names a file or a folder.
        session: whether it says how a run is carried out, not what comes out of it; it may change on --resume.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    sparsify: str | None = None
    path: bool = False
    session: bool = False


def option(
    default: T,
    help: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    sparsify: bool | str = False,
    path: bool = False,
    session: bool = False,
) -> T:
    """A field of Settings with its default and its help; ``sparsify`` is True where the help is the same there."""
    there = help if sparsify is True else sparsify or None
    return field(default=default, metadata={KEY: Option(help, flag, metavar, there, path, session)})


def option_of(one: Field[Any]) -> Option | None:
    """The option that a field is, or None."""
    return one.metadata.get(KEY)


def flag(name: str) -> str:
    """Field name -> how the option is written, without its --."""
    return name.replace("_", "-")
