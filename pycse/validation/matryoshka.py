"""Checks of what a loss at several lengths of the embeddings takes beside its own arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pycse.validation.checks import flag, real, weights_of, what, whole


def lengths(D: int | None, dims: Any, dim_weights: Any = None, parts: Any = False) -> None:
    """The lengths, the weights of their losses, and whether these are wanted; D: the embeddings' features, if known."""
    if isinstance(dims, Tensor) or not isinstance(dims, (list, tuple)):
        raise TypeError(f"dims must be a list of lengths, got {what(dims)}")
    if len(dims) == 0:
        raise ValueError("dims must hold at least one length, got an empty list")
    for d in dims:
        whole("dims", d)
        if d < 1:
            raise ValueError(f"dims must be >= 1, got {d}")
        if D is not None and d > D:
            raise ValueError(f"dims must lie in [1, {D}] (the embeddings' features), got {d}")
    if len(set(dims)) < len(dims):
        raise ValueError(f"dims must hold each length once, got {list(dims)!r}")
    weights_of("dim_weights", dim_weights, len(dims), "length")
    flag("parts", parts)


def needs_dims(dim_weights: Any, parts: Any) -> None:
    """Without lengths there is nothing to weigh, and one loss."""
    flag("parts", parts)
    for name, given in (("dim_weights", dim_weights is not None), ("parts", parts)):
        if given:
            raise ValueError(f"{name} must be given together with dims, got dims=None")


def lengths_a_step(n: Any, given: dict[str, Any], temperature: Any) -> None:
    """How many of the lengths a module takes in one step."""
    if n is None:
        return
    whole("n_dims_per_step", n)
    dims = given.get("dims")
    if dims is None:
        raise ValueError(f"n_dims_per_step must be given together with dims, got {n} and dims=None")
    if not 1 <= n <= len(dims):
        raise ValueError(f"n_dims_per_step must lie in [1, {len(dims)}] (the lengths in dims), got {n}")
    if given.get("parts"):
        raise ValueError("n_dims_per_step and parts exclude each other (nobody would know whose parts they are)")
    if one_a_length(temperature, len(dims)):
        raise ValueError("n_dims_per_step and a temperature for each length exclude each other; give one temperature")


def one_a_length(temperature: Any, K: int) -> bool:
    """Whether there is a temperature for each length: a sequence of numbers, or a 1-d tensor."""
    if isinstance(temperature, Tensor) and temperature.dim() == 1:
        if not temperature.dtype.is_floating_point or temperature.shape[0] != K:
            raise ValueError(
                f"temperature must be a number, a 0-d float tensor, or one for each of the {K} lengths, got "
                f"{what(temperature)}"
            )
        return True
    if not isinstance(temperature, (list, tuple)):
        return False
    if len(temperature) != K:
        raise ValueError(f"temperature must be one number, or one for each of the {K} lengths, got {temperature!r}")
    for k, t in enumerate(temperature):
        if isinstance(t, Tensor):
            raise TypeError(f"temperature[{k}] must be a number, got {what(t)}; give one (K,) tensor for all lengths")
        real(f"temperature[{k}]", t, positive=True)
    return True
