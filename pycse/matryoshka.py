"""Losses at several lengths of the embeddings: what their public functions share.

    L = sum_k w_k L(z1[:, :d_k], z2[:, :d_k])

InfoNCE and Focal-InfoNCE make all lengths from one loss' products (panels/prefixes.py); other losses are computed length
by length.

Source: Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022 (arXiv 2205.13147), eq. 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycse import validation
from pycse.problem import Lengths


class MatryoshkaOutput(NamedTuple):
    """``loss`` is to be differentiated; ``parts`` are the losses of each length in the order of ``dims``, (K,) or
    (K, B), without weights and detached."""

    loss: Tensor
    parts: Tensor


def wanted(dims: Any, dim_weights: Any, parts: Any) -> bool:
    """Whether a loss is of several lengths; an error where only what goes with them is given."""
    if dims is None:
        validation.needs_dims(dim_weights, parts)
    return dims is not None


def lengths_of(D: int, temperature: Any, dims: Any, dim_weights: Any, parts: Any) -> tuple[Lengths, Any, Any]:
    """The lengths that a public function's arguments state, once they are checked; the temperatures of all lengths, a
    number or (K,), and one of them, for checks of one; D: the embeddings' features."""
    validation.lengths(D, dims, dim_weights, parts)
    K = len(dims)
    weights = [1.0] * K if dim_weights is None else [float(w) for w in dim_weights]
    one = temperature
    if each := validation.one_a_length(temperature, K):
        if not isinstance(temperature, Tensor):
            temperature = torch.tensor([float(t) for t in temperature], dtype=torch.float64, device="cpu")
        one = temperature[0] if temperature.requires_grad else temperature.detach().min()
    return Lengths([int(d) for d in dims], weights, each), temperature, one


def output(losses: tuple[Tensor, ...], parts: bool) -> Tensor | MatryoshkaOutput:
    return MatryoshkaOutput(losses[0], losses[1].detach()) if parts else losses[0]


def over_lengths(
    loss: Callable[..., Any],
    z1: Tensor,
    z2: Tensor | None,
    temperature: Any,
    dims: Sequence[int],
    dim_weights: Sequence[float] | None,
    parts: bool,
) -> tuple[list[Any], Lengths]:
    """What ``loss`` of z1, z2 and a temperature returns for each length."""
    if z2 is None:
        validation.embeddings("z1", z1)
    else:
        validation.rows_and_keys(z1, z2)
    lengths, temperature, _ = lengths_of(z1.shape[1], temperature, dims, dim_weights, parts)
    result = []
    for k, d in enumerate(lengths.dims):
        each = temperature[k] if lengths.temperatures else temperature
        result.append(loss(z1[:, :d], None if z2 is None else z2[:, :d], each))
    return result, lengths


def weighted_sum(losses: Sequence[Tensor], lengths: Lengths) -> Tensor:
    return torch.stack([loss * w for loss, w in zip(losses, lengths.dim_weights)]).sum(0)


def summed(loss: Callable[..., Tensor], z1: Tensor, z2: Tensor | None, temperature: Any, dims: Any, dim_weights: Any, parts: Any) -> Any:
    """A loss that is computed length by length."""
    losses, lengths = over_lengths(loss, z1, z2, temperature, dims, dim_weights, parts)
    return output((weighted_sum(losses, lengths), torch.stack([one.detach() for one in losses])), parts)
