"""What a loaded encoder is tried for, before anything is done with it.

    weights     none that the encoder uses was made up by the loader
    tokenizer   it knows characters, and has no more tokens than the encoder has embeddings
    length      no longer than the encoder's positions
    texts       a long one and an empty one can be embedded

All raise UserError.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pycse.training.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Letters of many scripts: a vocabulary of one language knows some of them.
CHARACTERS = list(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,éüñжяиსअकাআதابلאשαω的一是のアあ한국กาአሀ"
)
LONG = 512  # words of the long text; more where the encoder reads further, up to the limit below
LONGEST = 1024
NAMED = 3  # weights or tokens that a message names


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


def check_loaded(encoder: SentenceTransformer, reports: list[tuple[Any, dict[str, Any]]]) -> None:
    """Everything in the order of the module's text; the length limit is lowered where it is beyond the positions."""
    tokenizer: Any = getattr(encoder[0], "tokenizer", None)
    if hasattr(tokenizer, "pad_token") and tokenizer.pad_token is None:
        give_padding(tokenizer)
    check_tokenizer(encoder, tokenizer)
    for model, report in reports:
        check_weights(encoder, model, report)
    limit_length(encoder)
    check_texts(encoder)


# ---- weights


def check_weights(encoder: SentenceTransformer, model: nn.Module, report: dict[str, Any]) -> None:
    """Raise UserError for weights that were made up though embeddings depend on them, and for layers left out.

    A part of the model that has no gradient at all (BERT's pooler below mean pooling) may be missing, if it is one of
    the model's own children: a layer that a short text happens not to use may not.
    """
    sizes = {name: (tuple(file), tuple(wanted)) for name, file, wanted in report.get("mismatched_keys", ())}
    missing = {*report.get("missing_keys", ()), *sizes}
    unexpected = sorted(report.get("unexpected_keys", ()))
    if missing:
        unused = unused_children(encoder, model)
        used = sorted(name for name in missing if name.split(".")[0] not in unused)
        if other := [f"{name} {sizes[name][0]} instead of {sizes[name][1]}" for name in used if name in sizes]:
            raise UserError(
                f"the weights do not match the model: {listed(other)}; weights and config.json are not of one model"
            )
        if used:
            raise UserError(
                f"the weights do not match the model: {listed(used)} "
                f"{'is' if len(used) == 1 else 'are'} missing and would be random{prefixed(used, unexpected)}"
            )
    left_out = [name for name in unexpected if beyond_a_list(model, name)]
    if left_out:
        raise UserError(
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


def unused_children(encoder: SentenceTransformer, model: nn.Module) -> set[str]:
    """Names of the model's children of which no parameter has a gradient when texts are embedded."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        embeddings = embed(encoder, ["a text", " ".join(CHARACTERS)])
        gradients = torch.autograd.grad(embeddings.float().sum(), list(named.values()), allow_unused=True)
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


# ---- tokenizer


def give_padding(tokenizer: Any) -> None:
    """Let another special token fill up shorter texts; the attention mask hides it wherever it is."""
    for name in ("eos_token", "unk_token", "bos_token"):
        if (token := getattr(tokenizer, name, None)) is not None:
            tokenizer.pad_token = token
            return
    raise UserError("its tokenizer has no padding token and no other special one to take; set pad_token and save it")


def check_tokenizer(encoder: SentenceTransformer, tokenizer: Any) -> None:
    """Raise UserError for a tokenizer that knows no text, or more tokens than the encoder has embeddings."""
    from tokenizers import Tokenizer

    if isinstance(tokenizer, Tokenizer):
        ids = tokenizer.encode(" ".join(CHARACTERS), add_special_tokens=False).ids
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        unknown = vocabulary.get(getattr(tokenizer.model, "unk_token", None) or "")
    elif hasattr(tokenizer, "convert_ids_to_tokens"):
        each = tokenizer(CHARACTERS, add_special_tokens=False)["input_ids"]
        vocabulary, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
        special = set(tokenizer.all_special_ids)
        ids = [one for of_text in each for one in of_text if one not in special]
    else:  # bags of words and the like
        return
    if all(one == unknown for one in ids):
        raise UserError(
            f"its tokenizer knows no text ({len(vocabulary)} tokens, all characters are unknown); its files "
            "(tokenizer.json, vocab.txt, tokenizer.model) may be missing from the folder"
        )
    rows = embedding_rows(encoder)
    last = max(vocabulary.values(), default=0)
    if rows is not None and last >= rows:
        raise UserError(
            f"its tokenizer has tokens up to number {last} and the model {rows} embeddings, so texts with the others "
            "cannot be read; give a folder whose tokenizer and weights were saved together"
        )


def embedding_rows(encoder: SentenceTransformer) -> int | None:
    """Tokens that the encoder has an embedding of; None where that cannot be told."""
    backbone: Any = getattr(encoder[0], "auto_model", None)
    if backbone is None:
        table = getattr(encoder[0], "embedding", None)
        return table.num_embeddings if isinstance(table, nn.EmbeddingBag) else None
    try:
        return backbone.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None


# ---- length


def position_limit(encoder: SentenceTransformer) -> int | None:
    """Tokens that the transformer has positions for; None without a limit.

    RoBERTa and its like count positions from padding_idx + 1: of 514 they use 512.
    """
    backbone: Any = getattr(encoder[0], "auto_model", None)
    positions = getattr(getattr(backbone, "config", None), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return min(positions, module.num_embeddings) - module.padding_idx - 1
    return positions


def limit_length(encoder: SentenceTransformer) -> None:
    """Lower the encoder's length limit to its positions."""
    limit, own = position_limit(encoder), encoder.max_seq_length
    if limit is not None and own is not None and own > limit:
        encoder.max_seq_length = limit


# ---- texts


def check_texts(encoder: SentenceTransformer) -> None:
    """Raise UserError unless a long text and an empty one get finite embeddings of one width."""
    own = encoder.max_seq_length
    words = LONG if own is None or own > LONGEST else max(own, 8)
    long = " ".join(CHARACTERS[i % len(CHARACTERS)] for i in range(words))
    for texts, what in (
        ([long, "a"], f"a text of {words} words"),
        ([long, ""], "an empty text"),
        ([""], "an empty text"),
    ):
        try:
            with torch.no_grad():
                embeddings = embed(encoder, texts)
        except Exception as error:  # whatever the architecture raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"it cannot embed {what} ({reason}); its length limit is {own}") from error
        if not embeddings.isfinite().all():
            raise UserError(f"its embedding of {what} is not finite; its weights are damaged, or of too small a dtype")


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
