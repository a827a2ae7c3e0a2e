"""Teachers: encoders that are not trained and whose similarities the student learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pycse.training import ranks
from pycse.training.encoder import load_encoder
from pycse.training.errors import UserError
from pycse.training.names import resolve_teachers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Teacher:
    """One encoder in evaluation mode, with its own tokenizer, prompt and length limit, and perhaps a cache.

    Args:
        name: what people call it.
        encoder: not changed, but put in evaluation mode; no gradient goes into it.
        cache: folder for its embeddings.

    Raises:
        UserError, also when called: the cache cannot be used.
    """

    def __init__(self, name: str, encoder: SentenceTransformer, cache: str | None = None):
        from pycse.sentence_transformers import CachedTeacher

        self.name = name
        self.encoder = encoder.eval().requires_grad_(False)
        self.width = int(encoder.encode(["width"], show_progress_bar=False).shape[1])
        self.read = 0  # sentences, without a cache
        with cache_of_the_user():
            self.cached = CachedTeacher(encoder, cache) if cache else None

    def __call__(self, sentences: Sequence[str]) -> torch.Tensor:
        """(B, D_k) float embeddings on the encoder's device, without gradient."""
        from pycse.sentence_transformers.distillation import embed

        if self.cached is None:
            self.read += len(sentences)
            return embed(self.encoder, sentences)
        with cache_of_the_user():
            return self.cached(sentences)

    @property
    def embedded(self) -> int:
        """Sentences that the encoder read."""
        return self.read if self.cached is None else self.cached.embedded

    @property
    def found(self) -> int:
        """Sentences that the cache had."""
        return 0 if self.cached is None else self.cached.found

    def as_dict(self) -> dict:
        """For metrics.json."""
        return {
            "name": self.name,
            "width": self.width,
            "max_length": self.encoder.max_seq_length,
            "parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
            "embedded": self.embedded,
            "from_cache": self.found,
            "cache": str(self.cached.path) if self.cached else None,
        }


@contextmanager
def cache_of_the_user() -> Iterator[None]:
    """A cache that cannot be used is the user's to put right."""
    from pycse.embedding_cache import CacheError

    try:
        yield
    except CacheError as error:
        raise UserError(f"--cache-teachers: {error}") from error


def described(teachers: Sequence[Teacher]) -> list[dict]:
    """as_dict of every teacher; the sentences are those of all ranks."""
    one = [teacher.as_dict() for teacher in teachers]
    every = ranks.exchange([[teacher.embedded, teacher.found] for teacher in teachers])
    counts = [tuple(map(sum, zip(*of_ranks))) for of_ranks in zip(*every)]
    return [known | {"embedded": made, "from_cache": found} for known, (made, found) in zip(one, counts)]


def load_teachers(names: Sequence[str], device: str, cache: str | None, **options: Any) -> list[Teacher]:
    """Load every teacher; UserError for one that cannot be had or whose cache cannot be used.

    Args:
        options: of load_encoder.
    """
    teachers = []
    for name, (folder, _) in zip(names, resolve_teachers(names)):
        try:
            encoder = load_encoder(folder, device, **options)
        except UserError as error:
            raise UserError(f"--teacher: {error}") from error
        teachers.append(Teacher(name, encoder, cache))
    return teachers
