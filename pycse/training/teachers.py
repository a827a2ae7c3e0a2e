"""Teachers: encoders that are not trained and whose similarities the student learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pycse.training.cache import EmbeddingCache, key_of
from pycse.training.encoder import load_encoder, resolve_teachers
from pycse.training.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Teacher:
    """One encoder in evaluation mode, with its own tokenizer, prompt and length limit, and perhaps a cache.

    Args:
        name: what people call it.
        encoder: not changed, but put in evaluation mode; no gradient goes into it.
        cache: folder for its embeddings.
    """

    def __init__(self, name: str, encoder: SentenceTransformer, cache: str | None = None):
        self.name = name
        self.encoder = encoder.eval().requires_grad_(False)
        self.width = int(encoder.encode(["width"], show_progress_bar=False).shape[1])
        self.embedded = 0  # sentences that the encoder read
        self.found = 0  # sentences that the cache had
        self.cache = EmbeddingCache(cache, fingerprint(encoder), self.width) if cache else None

    def __call__(self, sentences: Sequence[str]) -> torch.Tensor:
        """(B, D_k) float embeddings on the encoder's device, without gradient."""
        if self.cache is None:
            return self.embed(sentences)
        held = {text: self.cache.get(text) for text in dict.fromkeys(sentences)}
        missing = [text for text, embedding in held.items() if embedding is None]
        self.found += len(sentences) - len(missing)
        if missing:
            new = self.embed(missing).float().cpu().numpy()
            self.cache.add(missing, new)
            held.update(zip(missing, new))
        rows = torch.stack([torch.tensor(held[text], dtype=torch.float32, device="cpu") for text in sentences])
        return rows.to(self.encoder.device)

    def embed(self, sentences: Sequence[str]) -> torch.Tensor:
        from pycse.sentence_transformers.distillation import embed

        self.embedded += len(sentences)
        return embed(self.encoder, sentences)

    def as_dict(self) -> dict:
        """For metrics.json."""
        return {
            "name": self.name,
            "width": self.width,
            "max_length": self.encoder.max_seq_length,
            "parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
            "embedded": self.embedded,
            "from_cache": self.found,
            "cache": str(self.cache.path) if self.cache else None,
        }


def fingerprint(encoder: SentenceTransformer) -> str:
    """Key of everything that an embedding depends on but its text: modules, weights, tokenizer, prompt, length."""
    modules: list = [(type(module).__name__, getattr(module, "get_config_dict", dict)()) for module in encoder]
    config = getattr(getattr(encoder[0], "auto_model", None), "config", None)
    fast = getattr(encoder.tokenizer, "backend_tokenizer", encoder.tokenizer)
    tokenizer = json.loads(fast.to_str()) if hasattr(fast, "to_str") else {"object": repr(encoder.tokenizer)}
    parts = {
        "modules": modules,
        # Without _name_or_path: where a model lies does not matter.
        "transformer": {k: v for k, v in config.to_dict().items() if k[0] != "_"} if config else None,
        # Without what the latest call left behind; the limit is max_length.
        "tokenizer": {k: v for k, v in tokenizer.items() if k not in ("truncation", "padding")},
        "prompt": [encoder.prompts, encoder.default_prompt_name],
        "max_length": encoder.max_seq_length,
    }
    return key_of(parts, encoder.state_dict())


def load_teachers(names: Sequence[str], device: str, cache: str | None) -> list[Teacher]:
    """Load every teacher; UserError for one that cannot be had or whose cache cannot be used."""
    teachers = []
    for name, (folder, _) in zip(names, resolve_teachers(names)):
        try:
            encoder = load_encoder(folder, device)
        except UserError as error:
            raise UserError(f"--teacher: {error}") from error
        teachers.append(Teacher(name, encoder, cache))
    return teachers
