"""The options of a command, made of the fields of Settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from pycse.training.options import Option, flag, option_of
from pycse.training.settings import Settings

OPTIONS = {field.name: known for field in fields(Settings) if (known := option_of(field)) is not None}
DEFAULTS = Settings()


def parameter(name: str, known: Option, kind: Any, help: str, default: Any) -> inspect.Parameter:
    """A setting as typer wants it."""
    if get_origin(kind) is tuple and Ellipsis in get_args(kind):  # repeatable
        kind, default = list[str] | None, None
    # A flag has no --no-: what is off need not be said.
    flags = [f"--{known.flag or flag(name)}"]
    said = typer.Option(*flags, help=help, metavar=known.metavar)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, said])


def with_settings(command: str, argument: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the keyword arguments ``**settings`` of a command become the options that Settings has for it.

    Args:
        command: "train" has all, "sparsify" those with help for it.
        argument: a setting that is given without its name.
    """
    hints = get_type_hints(Settings)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        made = []
        for name, known in OPTIONS.items():
            help = known.help if command == "train" else known.sparsify
            if help is None:
                continue
            default = next(field.default for field in fields(Settings) if field.name == name)
            one = parameter(name, known, hints[name] | None if default is None else hints[name], help, default)
            if name == argument:
                one = one.replace(annotation=Annotated[hints[name], typer.Argument(help=help)])
            made.append(one)
        own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]

        def run(**given: Any) -> None:
            function(**given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(made + own)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in made + own} | {"return": None}
        return run

    return decorate


def settings_of(given: dict[str, Any], **more: Any) -> Settings:
    """Settings of the options that a command was given."""
    values: dict[str, Any] = {**given, **more}
    for name in ("eval_files", "teachers"):
        values[name] = tuple(values.get(name) or ())
    return Settings(**values)
