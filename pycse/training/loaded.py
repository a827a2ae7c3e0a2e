"""What a loaded encoder is tried for, before anything is done with it.

    weights     none that the encoder uses was made up by the loader (pycse/loaded_weights.py, WrongWeights)
    tokenizer   it knows characters, and has no more tokens than the encoder has embeddings
    length      no longer than the encoder's positions
    texts       a long one and an empty one can be embedded

The others raise UserError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pycse.loaded_weights import CHARACTERS, check_weights, embed, embeddings_of_texts
from pycse.training.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LONG = 512  # words of the long text; more where the encoder reads further, up to the limit below
LONGEST = 1024


def check_loaded(encoder: SentenceTransformer, reports: list[tuple[Any, dict[str, Any]]]) -> None:
    """Everything in the order of the module's text; the length limit is lowered where it is beyond the positions."""
    tokenizer: Any = getattr(encoder[0], "tokenizer", None)
    if hasattr(tokenizer, "pad_token") and tokenizer.pad_token is None:
        give_padding(tokenizer)
    check_tokenizer(encoder, tokenizer)
    for model, report in reports:
        check_weights(model, report, embeddings_of_texts(encoder))
    limit_length(encoder)
    check_texts(encoder)


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
