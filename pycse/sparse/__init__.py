"""Sparse layers: weights removed under a mask, and products that skip them."""

from pycse.sparse.linear import SparseLinear, masked_linear

__all__ = ["SparseLinear", "masked_linear"]
