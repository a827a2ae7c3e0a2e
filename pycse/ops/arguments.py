"""An operator's arguments are the fields of its problems (pycse/problem.py), by their names.

A schema has a type for most of them; a number that may be a tensor becomes two arguments, ``x`` (a tensor or None) and
``x_value``, and a named tuple one for each of its fields. ``needs`` follows all others, in the operator alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from torch import Tensor

TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[float]: "float[]",
    list[int]: "int[]",
    float | None: "float?",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
}
NUMBERS: dict[Any, str] = {float | Tensor: "float", int | Tensor: "int"}
NOT_GIVEN = ("need", "needs")  # fields that say which gradients are wanted


class Arguments:
    """Those of one operator: of one problem or of several, which share fields by name. Tensors come first."""

    def __init__(self, *problems: type, optional: tuple[str, ...] = (), **others: type) -> None:
        self.problems = problems
        tensors: dict[str, str] = {}
        options: dict[str, str] = {}
        self.parts: dict[type, list[Field]] = {}
        self.joined: dict[type, list[Field]] = {}  # of several arguments
        for problem in problems:
            hints = get_type_hints(problem)
            self.parts[problem] = [
                Field(f.name, hints[f.name]) for f in dataclasses.fields(problem) if f.name not in NOT_GIVEN
            ]
            self.joined[problem] = [field for field in self.parts[problem] if not field.single]
            for field in self.parts[problem]:
                for name, kind in field.arguments.items():
                    kind = "Tensor?" if name in optional else kind
                    (tensors if kind in ("Tensor", "Tensor?") else options).setdefault(name, kind)
        options.update({name: TYPES[kind] for name, kind in others.items()})
        self.tensors = tuple(tensors)  # single tensors, which autograd keeps
        self.others = tuple(others)
        self.types = {**tensors, **options}
        self.names = tuple(self.types)
        self.at = {name: k for k, name in enumerate(self.names)}

    @property
    def schema(self) -> str:
        return ", ".join(f"{kind} {name}" for name, kind in self.types.items())

    def flat(self, *problems: Any, **others: Any) -> tuple[Any, ...]:
        """The arguments in the schema's order, of problems and others."""
        named = others
        for problem in problems:
            named.update(vars(problem))  # most fields are arguments of their own
            for field in self.joined[type(problem)]:
                field.put(named[field.name], named)
        return tuple(map(named.__getitem__, self.names))

    def named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.names, args))

    def problem(self, kind: type, named: Mapping[str, Any]) -> Any:
        """The problem that these arguments are of."""
        return kind(*[named[f.name] if f.single else f.take(named) for f in self.parts[kind]])


class Field:
    def __init__(self, name: str, kind: Any) -> None:
        self.name, self.kind = name, kind
        self.number, self.parts = kind in NUMBERS, getattr(kind, "_fields", ())
        self.single = not (self.number or self.parts)
        if self.number:
            self.arguments = {name: "Tensor?", f"{name}_value": NUMBERS[kind]}
        elif self.parts:
            hints = get_type_hints(kind)
            self.arguments = {f"{name}_{part}": TYPES[hints[part]] for part in self.parts}
        else:
            self.arguments = {name: TYPES[kind]}

    def put(self, value: Any, named: dict[str, Any]) -> None:
        if self.number:
            tensor = isinstance(value, Tensor)
            named[self.name] = value if tensor else None
            named[f"{self.name}_value"] = 1 if tensor else value
        elif self.parts:
            named.update(zip(self.arguments, value))

    def take(self, named: Mapping[str, Any]) -> Any:
        if self.number:
            tensor = named[self.name]
            return named[f"{self.name}_value"] if tensor is None else tensor
        if self.parts:
            return self.kind(*(named[f"{self.name}_{part}"] for part in self.parts))
