"""Losses at several lengths of the embeddings: what their public functions share.

    L = sum_k w_k L(z1[:, :d_k], z2[:, :d_k])

InfoNCE and Focal-InfoNCE make all lengths from one loss' products (panels/prefixes.py); other losses are computed
length by length.

Source: Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022 (arXiv 2205.13147), eq. 1.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
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


def wanted(z1: Any, dims: Any, dim_weights: Any, parts: Any, group: Any) -> bool:
    """Whether a loss is of several lengths; an error where only what goes with them is given."""
    if dims is None and (dim_weights is not None or parts is not False):
        with on_all_ranks(z1, group):
            validation.needs_dims(dim_weights, parts)
    return dims is not None


@contextlib.contextmanager
def on_all_ranks(z1: Any, group: Any) -> Iterator[None]:
    """An error here is one on the other ranks as well."""
    try:
        yield
    except Exception as error:
        if group is not None:
            from pycse import distributed

            distributed.refuse(error, z1, group)
        raise


def lengths_of(D: int, temperature: Any, dims: Any, dim_weights: Any, parts: Any) -> tuple[Lengths, Any, Any]:
    """The lengths that a public function's arguments state, once they are checked; the temperatures of all lengths, a
    number or (K,), and one of them, for checks of one; D: the embeddings' features."""
    validation.lengths(D, dims, dim_weights, parts)
    K = len(dims)
    weights = [1.0] * K if dim_weights is None else [float(w) for w in dim_weights]
    lengths = Lengths([int(d) for d in dims], weights, validation.one_a_length(temperature, K))
    if not lengths.temperatures:
        return lengths, temperature, temperature
    if isinstance(temperature, Tensor):
        return lengths, temperature, temperature[0]
    each = [float(t) for t in temperature]
    return lengths, torch.tensor(each, dtype=torch.float64, device="cpu"), min(each)


def output(losses: tuple[Tensor, ...], parts: bool) -> Any:
    return MatryoshkaOutput(losses[0], losses[1].detach()) if parts else losses[0]


def filled(given: dict[str, Any], group: Any) -> dict[str, Any]:
    """The arguments for checks of one process: over a group a rank may have no rows."""
    if group is None:
        return given
    from pycse import distributed

    return distributed.filled(given, False)


def over_lengths(
    name: str, loss: Callable[..., Any], z1: Any, z2: Any, temperature: Any, dims: Any, dim_weights: Any, parts: Any,
    group: Any,
) -> tuple[list[Any], Lengths]:  # fmt: skip
    """What ``loss`` of z1, z2 and a temperature returns for each length; ``name``: the public function's."""
    with on_all_ranks(z1, group):
        rows = filled({"z1": z1, "z2": z2}, group)
        validation.embeddings("z1", rows["z1"])
        if z2 is not None:
            validation.rows_and_keys(**rows)
        lengths, *_ = lengths_of(z1.shape[1], temperature, dims, dim_weights, parts)
    if group is not None:  # of more lengths a rank would make more calls than others
        from pycse import distributed

        told = {"function": f"{name} with dims", **{n: repr(x) for n, x in vars(lengths).items()}}
        distributed.alike(told, z1, group)
    result = []
    for k, d in enumerate(lengths.dims):
        each = temperature[k] if lengths.temperatures else temperature
        result.append(loss(z1[:, :d], None if z2 is None else z2[:, :d], each))
    return result, lengths


def weighted_sum(losses: Sequence[Tensor], lengths: Lengths) -> Tensor:
    return torch.stack([loss * w for loss, w in zip(losses, lengths.dim_weights)]).sum(0)


def summed(
    name: str, loss: Callable[..., Tensor], z1: Any, z2: Any, temperature: Any, dims: Any, dim_weights: Any, parts: Any,
    group: Any,
) -> Any:  # fmt: skip
    """A loss that is computed length by length."""
    losses, lengths = over_lengths(name, loss, z1, z2, temperature, dims, dim_weights, parts, group)
    return output((weighted_sum(losses, lengths), torch.stack([one.detach() for one in losses])), parts)


class Drawn:
    """A module's lengths, all of them or, while it is trained, some of them at each step.

    Processes that call alike draw alike: what the n-th call takes follows from n.
    """

    training: bool
    n_dims_per_step: int | None = None
    draws = 0

    def check_lengths(self, options: dict[str, Any]) -> dict[str, Any]:
        """A module's options but those of lengths, once these are checked; ``n_dims_per_step`` is taken from them."""
        self.n_dims_per_step = options.pop("n_dims_per_step", None)
        if self.n_dims_per_step is not None:
            _draw_uncompiled()
        given: dict[str, Any] = {name: options[name] for name in ("dims", "dim_weights", "parts") if name in options}
        others = {name: value for name, value in options.items() if name not in given}
        if given.get("dims") is None:
            validation.needs_dims(given.get("dim_weights"), given.get("parts", False))
        else:
            validation.lengths(None, **given)
            if validation.one_a_length(options.get("temperature"), len(given["dims"])):
                del others["temperature"]
        validation.lengths_a_step(self.n_dims_per_step, given, options.get("temperature"))
        return others

    def described(self) -> dict[str, Any]:
        """What a module's description has beside its options."""
        return {} if self.n_dims_per_step is None else {"n_dims_per_step": self.n_dims_per_step}

    def drawn(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options with the lengths of this step; a trainer evaluates without gradients, and leaves its loss in
        training mode."""
        n = self.n_dims_per_step
        if n is None or not (self.training and torch.is_grad_enabled()):
            return options
        chosen = chosen_lengths(self, len(options["dims"]), n)
        given = {name: options[name] for name in ("dims", "dim_weights") if options.get(name) is not None}
        return options | {name: [values[k] for k in chosen] for name, values in given.items()}


def chosen_lengths(module: Drawn, K: int, n: int) -> list[int]:
    module.draws += 1
    return sorted(random.Random(module.draws).sample(range(K), n))


@functools.cache
def _draw_uncompiled() -> None:
    """torch.compile leaves a step's draw out; saying so loads its compiler, so only where lengths are drawn."""
    global chosen_lengths
    chosen_lengths = torch.compiler.disable(chosen_lengths, reason="pycse: lengths are drawn anew in each step")
