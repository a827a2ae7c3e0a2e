"""The table that a static run starts from: random, an encoder's embeddings of its tokens, or another table.

An encoder's are made as model2vec makes them (Tulkens & van Dongen, 2024): every token between the encoder's closing
and opening tokens, the mean of the last layer, principal components, and SIF weights (Arora, Liang & Ma, ICLR 2017)

    w_r = a / (a + p_r),    p_r = 1 / (r + 2) normalised to sum 1,    a = 1e-4

of the token's rank r in the vocabulary, since vocabularies are ordered by frequency (Zipf). This is an implementation
of our own: model2vec's distillation needs an older transformers than the training extras.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycse.training.encoder import load_encoder, loading_options
from pycse.training.errors import UserError
from pycse.training.settings import Settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SIF = 1e-4
UNUSED = re.compile(r"\[unused\d+\]")  # of BERT's vocabularies: no text has them
CHUNK = 1024  # tokens that an encoder reads at a time


@dataclass
class Start:
    """The static model before the training, where its rows came from, and the encoder that it stands beside (None: it
    began as another table)."""

    model: SentenceTransformer
    tokenizer: Any
    words: str
    encoder: SentenceTransformer | None


def start(settings: Settings, source: str, shown: str, device: str) -> Start:
    """The static model that the settings describe.

    Args:
        source, shown: the model to take the tokenizer or the embeddings from, and what people call it.

    Raises:
        UserError: for a source that does not fit.
    """
    width = settings.static
    assert width is not None
    of = "--init" if settings.init is not None else "--model"
    encoder = load_encoder(source, device, **loading_options(settings))
    rows = known_tokens(encoder, of, shown)
    tokenizer = own_tokenizer(encoder, of, shown)
    tokens = check_vocabulary(tokenizer, rows, is_static(encoder), of, shown)
    if settings.init is None:
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        weights = torch.randn(tokens, width, generator=generator, dtype=torch.float32, device="cpu")
        return Start(static_model(tokenizer, weights, device), tokenizer, f"random, tokens of {shown}", other(encoder))
    has = encoder.get_embedding_dimension()
    if has is None or has < width:
        raise UserError(f"--init {shown} is {has} wide, less than --static {width}; give --static {has} or less")
    if is_static(encoder):
        weights = bag(encoder).weight.detach().float().cpu()[:, :width].clone()
        words = f"the table of {shown}" + (f", the first {width} of {has} features" if width < has else "")
        return Start(static_model(tokenizer, weights, device), tokenizer, words, None)
    weights = scaled(principal(token_embeddings(encoder, tokens, of, shown), width), tokenizer)
    return Start(static_model(tokenizer, weights, device), tokenizer, f"token embeddings of {shown}", encoder)


def is_static(encoder: SentenceTransformer) -> bool:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return isinstance(encoder[0], StaticEmbedding)


def bag(model: SentenceTransformer) -> nn.EmbeddingBag:
    """The table itself."""
    found = model[0].embedding
    assert isinstance(found, nn.EmbeddingBag)
    return found


def other(encoder: SentenceTransformer) -> SentenceTransformer | None:
    return None if is_static(encoder) else encoder


def static_model(tokenizer: Any, weights: Tensor, device: str) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    module = StaticEmbedding(tokenizer, embedding_weights=weights)
    return SentenceTransformer(modules=[module], device=None if device == "auto" else device)


def known_tokens(encoder: SentenceTransformer, of: str, shown: str) -> int:
    """Rows of the model's own table of tokens."""
    if is_static(encoder):
        return bag(encoder).num_embeddings
    backbone: Any = getattr(encoder[0], "auto_model", None)
    if backbone is None:
        raise UserError(f"{of} {shown} has neither a transformer nor a static table inside; give one that has")
    return backbone.get_input_embeddings().num_embeddings


def own_tokenizer(encoder: SentenceTransformer, of: str, shown: str) -> Any:
    """A copy of the model's tokenizer that neither pads nor cuts: a bag of tokens has no longest text."""
    from tokenizers import Tokenizer

    found: Any = encoder.tokenizer
    found = getattr(found, "backend_tokenizer", found)
    if not isinstance(found, Tokenizer):
        raise UserError(f"{of} {shown} has no fast tokenizer, which a static table needs; give another model")
    copy = Tokenizer.from_str(found.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def check_vocabulary(tokenizer: Any, rows: int, static: bool, of: str, shown: str) -> int:
    """Rows that the table needs; UserError where the tokenizer is another model's."""
    tokens = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    # Transformers round their tables up; a static one has a row a token.
    if tokens > rows or (static and tokens != rows):
        raise UserError(
            f"{of} {shown}: its tokenizer has {tokens} tokens and its table {rows} rows, so the vocabulary is another "
            "model's; give a folder whose tokenizer and weights were saved together"
        )
    return tokens


def token_embeddings(encoder: SentenceTransformer, tokens: int, of: str, shown: str) -> Tensor:
    """(tokens, hidden) means of the last layer over closing token, token, opening token.

    The reversed order is model2vec's, which found it to work better.
    """
    read: Any = encoder.tokenizer
    full, bare = (read("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    at = next((k for k in range(len(full) - len(bare) + 1) if full[k : k + len(bare)] == bare), None)
    if at is None:
        raise UserError(f"{of} {shown}: its tokenizer hides a text's tokens; give another encoder")
    opening, closing = full[:at], full[at + len(bare) :]
    device = encoder.device
    found = []
    encoder.eval()
    with torch.no_grad():
        for k in range(0, tokens, CHUNK):
            rows = [[*closing, token, *opening] for token in range(k, min(k + CHUNK, tokens))]
            ids = torch.tensor(rows, dtype=torch.int64, device=device)
            features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found.append(encoder[0](features)["token_embeddings"].float().mean(1).cpu())
    return torch.cat(found)


def principal(x: Tensor, width: int) -> Tensor:
    """(tokens, width) principal components of the rows, the largest first: a prefix is the best of its length."""
    centred = x.double() - x.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors.flip(1)[:, :width]
    # An eigenvector's sign is the library's choice: its largest entry is positive, and runs on other machines agree.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return centred @ (vectors * largest.sign())


def scaled(x: Tensor, tokenizer: Any) -> Tensor:
    """SIF weights of the rows; then one factor for all, so that entries are about 1, as a random table's are, and a
    learning rate means the same. Rows of tokens that no text has are 0."""
    names = tokenizer.get_vocab(with_added_tokens=True)
    unused = torch.ones(len(x), dtype=torch.bool, device="cpu")
    unused[[k for name, k in names.items() if not UNUSED.fullmatch(name)]] = False
    rank = (~unused).cumsum(0) - 1
    p = 1 / (rank.double() + 2)
    p = p / p[~unused].sum()
    x = (x * (SIF / (SIF + p))[:, None]).masked_fill_(unused[:, None], 0.0)
    return (x / x[~unused].square().mean().sqrt()).float().contiguous()
