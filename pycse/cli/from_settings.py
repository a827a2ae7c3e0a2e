"""The options of a command, made of the fields of Settings; --config and --resume, which give them values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from pycse.cli.shared import reported
from pycse.training.errors import UserError
from pycse.training.folder import CONFIG, state_of
from pycse.training.options import Option, flag
from pycse.training.settings import FIELDS, Settings

HINTS = get_type_hints(Settings)
CONFIG_HELP = "File of options, as run.toml of a run's folder; options on the command line count more."


def with_settings(command: str, argument: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the keyword arguments of a command become the options that Settings has for it, and --config.

    Args:
        command: "train" has all, "sparsify" those with help for it.
        argument: a setting that is given without its name.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        defaults = {field.name: field.default for field in fields(Settings)}
        made = [config(command)]
        for name, known in FIELDS.items():
            help = known.help if command == "train" else known.sparsify
            if help is not None:
                made.append(parameter(command, name, known, help, defaults[name], name == argument))

        def run(**given: Any) -> None:
            del given["config"]
            function(**given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in made} | {"return": None}
        return run

    return decorate


def parameter(command: str, name: str, known: Option, help: str, default: Any, without_name: bool) -> inspect.Parameter:
    """A setting as typer wants it."""
    kind = HINTS[name]
    if get_origin(kind) is tuple and Ellipsis in get_args(kind):  # repeatable
        kind, default = list[str], None
    if default is None:
        kind = kind | None
    said: Any
    if without_name:
        said = typer.Argument(help=help)
    elif name == "resume":
        said = typer.Option("--resume", help=help, metavar=known.metavar, callback=from_run(command), is_eager=True)
    else:  # a flag has no --no-: what is off need not be said
        said = typer.Option(f"--{known.flag or flag(name)}", help=help, metavar=known.metavar)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, said])


def config(command: str) -> inspect.Parameter:
    """--config."""

    def read(context: typer.Context, value: str | None) -> str | None:
        if value is not None:
            with reported(command):
                take(context, command, Path(os.path.expanduser(value)), "--config")
        return value

    said = typer.Option("--config", help=CONFIG_HELP, metavar="FILE", callback=read, is_eager=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter("config", kind, default=None, annotation=Annotated[str | None, said])


def from_run(command: str) -> Callable[[typer.Context, str | None], str | None]:
    """--resume: the options are those of the run."""

    def read(context: typer.Context, value: str | None) -> str | None:
        if value is not None:
            with reported(command):
                folder = Path(os.path.expanduser(value))
                state_of(folder)
                take(context, command, folder / CONFIG, "--resume")
        return value

    return read


def take(context: typer.Context, command: str, path: Path, name: str) -> None:
    """Make a file's values the defaults of the options. UserError where it is no such file."""
    if context.default_map:
        raise UserError("--config and --resume exclude each other; a run that goes on has its own options")
    try:
        import tomllib
    except ModuleNotFoundError:  # before Python 3.11
        import tomli as tomllib
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot read {path} ({getattr(error, 'strerror', None) or error})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name} {path} is no TOML ({error})") from error
    has = {known.flag or flag(field): field for field, known in FIELDS.items() if command == "train" or known.sparsify}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        field = has.get(key.replace("_", "-"))
        if field is None:
            near = get_close_matches(key, has, 1)
            raise UserError(
                f"{name} {path}: {key} is no option of pycse {command}"
                + (f"; did you mean {near[0]}?" if near else "; pycse " + command + " --help lists them")
            )
        if not fits(value, HINTS[field]):
            raise UserError(f"{name} {path}: {key} is {value!r}, which is not of its kind; see pycse {command} --help")
        defaults[field] = value
    context.default_map = defaults


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a file is of an option's type."""
    if get_origin(hint) is tuple:
        kinds = [kind for kind in get_args(hint) if kind is not Ellipsis]
        count = len(value) if isinstance(value, list) and Ellipsis in get_args(hint) else len(kinds)
        return isinstance(value, list) and len(value) == count and all(type(one) is kinds[0] for one in value)
    kinds = list(get_args(hint)) or [hint]
    if any(get_origin(kind) is tuple for kind in kinds):
        return any(fits(value, kind) for kind in kinds if get_origin(kind) is tuple)
    return type(value) in kinds or (type(value) is int and float in kinds)


def settings_of(given: dict[str, Any], **more: Any) -> Settings:
    """Settings of the options that a command was given."""
    values: dict[str, Any] = {**given, **more}
    for field in fields(Settings):
        if field.default == ():  # repeatable
            values[field.name] = tuple(values.get(field.name) or ())
    return Settings(**values)
