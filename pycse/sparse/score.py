"""How much every parameter contributes to alignment and uniformity: a first-order Taylor score of its removal.

    l_align   = E ||f(x) - f(x+)||^2                    positive pairs, unit embeddings
    l_uniform = log E exp(-2 ||f(x) - f(y)||^2)         pairs i < j of a batch
    a = sum over batches |theta * d l_align / d theta|,  u likewise of l_uniform
    score = balance * a / mean(a) + (1 - balance) * u / mean(u)

Memory: two accumulators a parameter, and the gradient of one loss at a time. After An, Zhang & Song 2023 (SparseCSE,
arXiv 2311.03881); `combine` is the one place that the formula of the last line stands in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pycse import validation
from pycse.hypersphere import alignment, uniformity
from pycse.sparse.views import Pooling, embedder, halves

MEANS = ("global", "layer")


def score(
    encoder: nn.Module,
    batches: Iterable[Any],
    balance: float = 0.5,
    means: str = "global",
    *,
    pooling: Pooling | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    r"""Score of every entry of every parameter: what alignment and uniformity would change by without it, to first
    order.

    .. code-block:: text

        a = sum over batches |theta * d l_align / d theta|,    u likewise of l_uniform
        score = balance * a / mean(a) + (1 - balance) * u / mean(u)

    Positives: a batch alone is embedded twice, under two dropout masks, in training mode; a pair of batches (x, x+) is
    embedded in evaluation mode. Modes, buffers, requires_grad, gradients and the state of the random generators are
    afterwards what they were.

    Args:
        encoder: a SentenceTransformer, a transformers model (mean pooling by default), or any module with ``pooling``.
        batches: lists of sentences (SentenceTransformer only), tensors or mappings of tensors for the encoder, or pairs
            of them; each of at least 2 rows. Read once, one after the other.
        balance: share of alignment, in [0, 1].
        means: "global" divides by the mean over all parameters, "layer" by each parameter's own.
        pooling: function (output, batch) -> embeddings (B, D).
        seed: of dropout; None goes on from the generators' state.
        progress: whether to draw a progress bar on stderr.

    Returns:
        {parameter name: score}, shaped like the parameter, float32 (float64 for float64 parameters). Parameters that
        the embedding does not depend on score 0.

    Raises:
        ValueError: balance or means out of range; no batch; a batch of one row; pairs of unlike lengths; equal views,
        for
            want of dropout; a loss that no parameter changes; an encoder without floating-point parameters.
        TypeError: encoder, pooling or batches of another kind.

    Scores are not checked: an encoder with NaN or Inf has such scores, and `sparsify` refuses them.

    Source: An, Zhang & Song 2023 (SparseCSE, arXiv 2311.03881), after its abstract.
    """
    validation.number("balance", balance)
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must lie in [0, 1], got {balance!r}")
    validation.choice("means", means, MEANS)
    validation.flag("progress", progress)
    if seed is not None:
        validation.whole("seed", seed)
        validation.fits_64_bits("seed", seed)
    if isinstance(batches, (str, Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, got a {type(batches).__name__}; put one batch in a list"
        )
    embed = embedder(encoder, pooling)
    parameters = {name: p for name, p in encoder.named_parameters() if p.is_floating_point()}
    if not parameters:
        raise ValueError(f"encoder must have floating-point parameters; a {type(encoder).__name__} has none")

    if any(p.is_inference() for p in parameters.values()):
        raise ValueError("encoder must be made outside torch.inference_mode(): what is made inside has no gradients")
    count = 0
    with torch.inference_mode(False), unchanged(encoder, parameters.values(), seed), torch.enable_grad():
        a, u = (
            {name: torch.zeros_like(p, dtype=wide(p), requires_grad=False) for name, p in parameters.items()}
            for _ in range(2)
        )
        for batch in shown(batches, progress):
            for total, gradients in zip((a, u), taylor(encoder, embed, batch, list(parameters.values()))):
                for (name, p), gradient in zip(parameters.items(), gradients):
                    if gradient is not None:
                        total[name] += (p.detach().to(total[name].dtype) * gradient).abs()
            count += 1
    if count == 0:
        raise ValueError("batches must hold at least one batch, got none")
    return combine(a, u, balance, means)


def combine(a: dict[str, Tensor], u: dict[str, Tensor], balance: float, means: str) -> dict[str, Tensor]:
    """balance * a / mean(a) + (1 - balance) * u / mean(u); overwrites a and u.

    Raises:
        ValueError: a part that counts is 0 for every parameter.
    """
    entries = sum(total.numel() for total in a.values())
    for part, share, name in ((a, balance, "alignment"), (u, 1 - balance, "uniformity")):
        mean = sum(total.double().sum().item() for total in part.values()) / entries
        if share and mean == 0:
            raise ValueError(f"no parameter changes {name}: its gradient is 0 on all batches; give other batches")
        for total in part.values():
            divisor = mean if means == "global" else total.double().mean().item()
            total.mul_(share / divisor if share and divisor else 0.0)
    return {name: a[name].add_(u[name]) for name in a}


def taylor(encoder: nn.Module, embed: Any, batch: Any, parameters: list[nn.Parameter]) -> Iterator[tuple[Any, ...]]:
    """The gradients of alignment, then those of uniformity, on one batch; None where a loss does not depend."""
    first, second = halves(batch)
    encoder.train(second is None)
    x = embed(first)
    if x.shape[0] < 2:
        raise ValueError(f"batches must have at least 2 rows (uniformity is undefined for one), got {x.shape[0]}")
    y = embed(first if second is None else second)
    if y.shape != x.shape:
        raise ValueError(
            f"both halves of a pair must have as many rows, got embeddings {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if second is None and torch.equal(x, y):
        raise ValueError(
            "both views of a batch are equal, so alignment is 0: the encoder has no dropout; "
            "give pairs of batches (x, x+)"
        )
    yield torch.autograd.grad(alignment(x, y), parameters, retain_graph=True, allow_unused=True)
    del y
    yield torch.autograd.grad(uniformity(x), parameters, allow_unused=True)


def wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


@contextmanager
def unchanged(encoder: nn.Module, parameters: Iterable[nn.Parameter], seed: int | None) -> Iterator[None]:
    """Modes, requires_grad, buffers and random generators are restored at the end, also after an error.

    All parameters require grad inside. Gradients are not touched: autograd.grad leaves them alone.
    """
    parameters = list(parameters)
    modes = [(module, module.training) for module in encoder.modules()]
    wanted = [(p, p.requires_grad) for p in parameters]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in encoder.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            for p in parameters:
                p.requires_grad_(True)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for p, requires_grad in wanted:
                p.requires_grad_(requires_grad)
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer  # forward may have put another in its place
                    if buffer is not None and before is not None and not torch.equal(buffer, before):
                        buffer.copy_(before)


def shown(batches: Iterable[Any], progress: bool) -> Iterator[Any]:
    """The batches, with a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield from batches
        return
    yield from track(batches, "scoring", total=total, console=console, transient=True)
