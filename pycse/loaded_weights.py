"""Whether a loaded encoder has the weights of its folder: loaders make up those that they do not find.

WrongWeights, whose text is one line, for weights that are used and were made up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Letters of many scripts: a vocabulary of one language knows some of them.
CHARACTERS = list(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,éüñжяиსअकাআதابلאשαω的一是のアあ한국กาአሀ"
)
NAMED = 3  # weights or tokens that a message names


class WrongWeights(ValueError):
    """The weights in a model's folder are not those of the model."""


@contextmanager
def loading_reports() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """(model, its loading report) of every transformers model that is loaded meanwhile.

    sentence-transformers has no way to hand on the reports, which transformers gives to those who ask
    (output_loading_info).
    """
    from transformers import PreTrainedModel

    reports: list[tuple[Any, dict[str, Any]]] = []
    own = inspect.getattr_static(PreTrainedModel, "from_pretrained")
    original = own.__func__

    def from_pretrained(cls, *arguments, output_loading_info: bool = False, **options):
        # Weights of another size are then in the report, with their names, instead of an exception without.
        options = {"ignore_mismatched_sizes": True} | options
        model, report = original(cls, *arguments, output_loading_info=True, **options)
        reports.append((model, report))
        return (model, report) if output_loading_info else model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment,method-assign]
    try:
        yield reports
    finally:
        PreTrainedModel.from_pretrained = own  # type: ignore[method-assign]


def check_weights(model: nn.Module, report: dict[str, Any], embeddings: Callable[[], torch.Tensor]) -> None:
    """Raise WrongWeights for weights that were made up though embeddings depend on them, and for layers left out.

    A part of the model that has no gradient at all (BERT's pooler below mean pooling) may be missing, if it is one of
    the model's own children: a layer that a short text happens not to use may not.

    Args:
        report: of transformers, on loading the model.
        embeddings: of some texts, with a gradient; it is called where weights are missing.
    """
    sizes = {name: (tuple(file), tuple(wanted)) for name, file, wanted in report.get("mismatched_keys", ())}
    missing = {*report.get("missing_keys", ()), *sizes}
    unexpected = sorted(report.get("unexpected_keys", ()))
    if missing:
        unused = unused_children(model, embeddings)
        used = sorted(name for name in missing if name.split(".")[0] not in unused)
        if other := [f"{name} {sizes[name][0]} instead of {sizes[name][1]}" for name in used if name in sizes]:
            raise WrongWeights(
                f"the weights do not match the model: {listed(other)}; weights and config.json are not of one model"
            )
        if used:
            raise WrongWeights(
                f"the weights do not match the model: {listed(used)} "
                f"{'is' if len(used) == 1 else 'are'} missing and would be random{prefixed(used, unexpected)}"
            )
    left_out = [name for name in unexpected if beyond_a_list(model, name)]
    if left_out:
        raise WrongWeights(
            f"the weights do not match the model: {listed(left_out)} belong to layers that the configuration does not "
            "have; correct the number of layers in config.json"
        )


def prefixed(used: list[str], unexpected: list[str]) -> str:
    """What the file has instead of the weights that are used, in words."""
    for name in unexpected:
        for wanted in used:
            prefix = name.removesuffix(wanted)
            if prefix and prefix != name:
                words = f"; the file has them as {name}: save them without {prefix!r}"
                return words + (" (DistributedDataParallel: model.module)" if prefix == "module." else "")
    return f"; the file has {listed(unexpected)} instead" if unexpected else ""


def listed(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def unused_children(model: nn.Module, embeddings: Callable[[], torch.Tensor]) -> set[str]:
    """Names of the model's children of which no parameter has a gradient when texts are embedded."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        gradients = torch.autograd.grad(embeddings().float().sum(), list(named.values()), allow_unused=True)
    used = {name.split(".")[0] for name, gradient in zip(named, gradients) if gradient is not None}
    return {name for name, _ in model.named_children()} - used


def beyond_a_list(model: nn.Module, name: str) -> bool:
    """Whether a weight in a file would be in a layer behind the last one of a list of layers."""
    prefix = getattr(model, "base_model_prefix", "")
    parts = name.split(".")
    if prefix and parts[0] == prefix and not hasattr(model, prefix):
        parts = parts[1:]
    found: Any = model
    for part in parts:
        if isinstance(found, nn.ModuleList) and part.isdigit() and int(part) >= len(found):
            return True
        if not isinstance(found, nn.Module) or part not in found._modules:
            return False
        found = found._modules[part]
    return False


def embeddings_of_texts(encoder: SentenceTransformer) -> Callable[[], torch.Tensor]:
    """For check_weights, of a whole encoder."""
    return lambda: embed(encoder, ["a text", " ".join(CHARACTERS)])


def embeddings_of_tokens(model: Any) -> Callable[[], torch.Tensor]:
    """For check_weights, of a model of transformers alone: what its last layer puts out."""
    return lambda: model(**{name: ids.to(model.device) for name, ids in model.dummy_inputs.items()}).last_hidden_state


def embed(encoder: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    """(B, D) embeddings in evaluation mode."""
    from sentence_transformers.util import batch_to_device

    # Each module's own mode: sentence-transformers loads encoders whose transformer alone is in evaluation mode.
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        return encoder(batch_to_device(encoder.preprocess(texts), encoder.device))["sentence_embedding"]
    finally:
        for module, training in modes:
            module.training = training
