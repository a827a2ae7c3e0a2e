"""The values that arguments may have by name. Nothing is imported here: `pycse --help` reads them."""

from __future__ import annotations

REDUCTIONS = ("mean", "sum", "none")
SHUFFLES = ("sample", "expected", "none")
DIVERGENCES = ("ce", "kl", "js")
BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")  # pycse/backends has each
BACKEND_CHOICES = ("auto", *BACKENDS)
EXCLUDE_BY = ("absolute", "relative", "constant")
DIRECTIONS = ("qd", "qq", "dq", "dd")  # of rows and keys: queries and documents
PARTITIONS = ("joint", "per_direction")
OUTPUTS = ("loss", "logsum", "negatives")
