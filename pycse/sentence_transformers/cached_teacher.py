"""A teacher whose embeddings stay on disk: every text is read once, for all epochs, runs and processes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pycse.embedding_cache import CacheError, EmbeddingCache, key_of
from pycse.sentence_transformers.distillation import embed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class CachedTeacher:
    """A frozen SentenceTransformer as a function of texts, which keeps its embeddings in a folder.

        DistillCSELoss(model, [CachedTeacher(encoder, "embeddings")])

    The folder has a file a teacher, named after a hash of everything that an embedding depends on (modules, weights,
    tokenizer, prompt, length limit): a changed teacher never reads another's. Runs and processes may share it.

    Args:
        encoder: not changed, but put in evaluation mode; no gradient goes into it. To be changed no more: its file is
            chosen here.
        folder: made if it is not there.

    ``width`` is an embedding's, ``path`` the file; ``embedded`` counts the texts that the encoder has read, ``found``
    those that the file had.

    Raises:
        CacheError (a ValueError), also when called: the folder cannot be written; or its file of that name is another
            teacher's.
    """

    def __init__(self, encoder: SentenceTransformer, folder: str | Path):
        self.encoder = encoder.eval().requires_grad_(False)
        self.width = int(encoder.encode(["width"], show_progress_bar=False).shape[1])
        self.cache = EmbeddingCache(folder, fingerprint(encoder), self.width)
        self.path = self.cache.path
        self.embedded = 0
        self.found = 0
        self.failed = False  # whether the file can be written no more

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(B, D_k) float32 embeddings on the encoder's device, without gradient."""
        held = {text: self.cache.get(text) for text in dict.fromkeys(texts)}
        missing = [text for text, known in held.items() if known is None]
        if missing:
            self.cache.follow()  # another process may have appended them
            held.update((text, self.cache.get(text)) for text in missing)
            missing = [text for text in missing if held[text] is None]
        self.found += len(texts) - len(missing)
        self.embedded += len(missing)
        if missing:
            new = embed(self.encoder, missing).float().cpu().numpy()
            try:
                self.cache.add(missing, new)
            except CacheError as error:  # a full disk; what was read is there all the same
                if not self.failed:
                    warnings.warn(f"pycse: {error}; embeddings are not kept any more", stacklevel=2)
                self.failed = True
            held.update(zip(missing, new))
        rows = torch.stack([torch.tensor(held[text], dtype=torch.float32, device="cpu") for text in texts])
        return rows.to(self.encoder.device)


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
