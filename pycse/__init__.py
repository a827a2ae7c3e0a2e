"""pycse: fused contrastive and distillation losses for sentence embeddings.

from pycse import fused_focal_infonce
loss = fused_focal_infonce(z1, z2, temperature=0.05, m=0.3)
loss.backward()

What is named here comes from its module when it is first used, so that `pycse --help` waits for no torch. Where torch
is imported already, all comes at once, and with it the operators: a program that torch.export has saved finds them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pycse.adapacse import fused_adapacse
    from pycse.distillation import fused_distill, fused_distillcse
    from pycse.functional import fused_focal_infonce, fused_infonce
    from pycse.hypersphere import alignment, uniformity
    from pycse.log_sums import logsumexp_similarities
    from pycse.matryoshka import MatryoshkaOutput
    from pycse.report import info
    from pycse.sigmoid import fused_sigmoid
    from pycse.supervised import fused_supcon

__all__ = [
    "MatryoshkaOutput",
    "alignment",
    "fused_adapacse",
    "fused_distill",
    "fused_distillcse",
    "fused_focal_infonce",
    "fused_infonce",
    "fused_sigmoid",
    "fused_supcon",
    "info",
    "logsumexp_similarities",
    "uniformity",
]
__version__ = "0.1.0"

MODULES = {
    "adapacse": ("fused_adapacse",),
    "distillation": ("fused_distill", "fused_distillcse"),
    "functional": ("fused_focal_infonce", "fused_infonce"),
    "hypersphere": ("alignment", "uniformity"),
    "log_sums": ("logsumexp_similarities",),
    "matryoshka": ("MatryoshkaOutput",),
    "report": ("info",),
    "sigmoid": ("fused_sigmoid",),
    "supervised": ("fused_supcon",),
}


def load() -> None:
    """Take in everything that is named here."""
    for module, names in MODULES.items():
        found = import_module(f"pycse.{module}")
        globals().update({name: getattr(found, name) for name in names})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    load()
