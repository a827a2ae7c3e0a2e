"""The `pycse` command, a file a command. Everything heavy is imported inside the commands, so that help is quick."""

from pycse.cli import compare, encode, evaluate, info, mine, sparsify, train  # noqa: F401 (each registers its command)
from pycse.cli.app import app, main

__all__ = ["app", "main"]
