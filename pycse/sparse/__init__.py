"""Sparse encoders: score parameters, remove the least, compute with what is left.

from pycse.sparse import score, sparsify
report = sparsify(encoder, score(encoder, batches), sparsity=0.1)
"""

from pycse.pattern import pack_mask, unpack_mask
from pycse.sparse.linear import SparseLinear
from pycse.sparse.masked import masked_linear
from pycse.sparse.report import Report
from pycse.sparse.score import score
from pycse.sparse.sparsify import sparsify
from pycse.sparse.storage import load, restore

__all__ = [
    "Report",
    "SparseLinear",
    "load",
    "masked_linear",
    "pack_mask",
    "restore",
    "score",
    "sparsify",
    "unpack_mask",
]
