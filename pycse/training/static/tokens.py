"""The text as token ids: made once, kept in a file of the run, and read by index.

    ids      all texts' tokens behind one another, int32, memory-mapped
    starts   (texts + 1,) where each text begins
    sentences  the texts, by number
    hashes   (texts,) equal where texts are, as pycse.sentence_transformers.texts makes them
    index    (rows, columns) the number of the text in each place

A batch is rows of `index`; no text is copied, and no worker process is needed. A text that stands in several places
(the sentence that is one row's positive and the next one's anchor) is there once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycse.sentence_transformers.texts import hashes as hashes_of
from pycse.training.data import Text
from pycse.training.folder import of_disk

CHUNK = 16384  # texts tokenised at a time
BLOCK = 64  # texts that a teacher reads at a time


@dataclass
class Tokens:
    """Tokens of a text; fields as above."""

    sentences: list[str]
    ids: np.ndarray
    starts: np.ndarray
    hashes: Tensor
    index: np.ndarray

    def bags(self, texts: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """(input_ids, offsets), as nn.EmbeddingBag takes them, of texts by number."""
        first = self.starts[texts]
        lengths = self.starts[texts + 1] - first
        offsets = np.cumsum(lengths) - lengths
        flat = np.repeat(first - offsets, lengths)
        flat += np.arange(len(flat), dtype=flat.dtype)
        ids = torch.from_numpy(self.ids[flat].astype(np.int64))
        return ids.to(device), torch.from_numpy(offsets).to(device)


def tokenise(text: Text, tokenizer: Any, max_length: int, folder: str | Path) -> Tokens:
    """Tokens of every text, cut at max_length.

    Args:
        tokenizer: a tokenizers.Tokenizer, without padding and truncation.
        folder: where the file of ids is made.
    """
    numbers: dict[str, int] = {}
    index = np.empty((len(text.rows), len(text.columns)), dtype=np.int64)
    for i, row in enumerate(text.rows):
        for k, sentence in enumerate(row):
            index[i, k] = numbers.setdefault(sentence, len(numbers))
    sentences = list(numbers)
    path = Path(folder) / "tokens.int32"
    lengths, hashes = [], []
    with path.open("wb") as file:
        for k in range(0, len(sentences), CHUNK):
            chunk = [
                encoding.ids[:max_length]
                for encoding in tokenizer.encode_batch_fast(sentences[k : k + CHUNK], add_special_tokens=False)
            ]
            counts = np.array([len(ids) for ids in chunk], dtype=np.int64)
            ids = np.fromiter((token for ids in chunk for token in ids), dtype=np.int32, count=int(counts.sum()))
            ids.tofile(file)
            lengths.append(counts)
            bags = {
                "input_ids": torch.from_numpy(ids.astype(np.int64)),
                "offsets": torch.from_numpy(counts.cumsum() - counts),
            }
            hashes.append(equal_texts(bags))
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.concatenate(lengths).cumsum()])
    empty = np.empty(0, dtype=np.int32)  # a file without a byte cannot be mapped
    ids = np.memmap(path, dtype=np.int32, mode="r") if starts[-1] else empty
    return Tokens(sentences, ids, starts, torch.cat(hashes), index)


def equal_texts(bags: dict[str, Tensor]) -> Tensor:
    found = hashes_of(bags)
    if found is None:
        raise AssertionError("bags of tokens have token ids")
    return found


def batches(rows: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of full batches, without end: every epoch in an order of its own."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(rows)
        for k in range(0, rows - size + 1, size):
            yield order[k : k + size]


class KeptTeacher:
    """A teacher that reads each text once in a run; its embeddings lie in a file.

    It reads BLOCK neighbours at a time, whichever of them is asked for: the last bits of an embedding depend on what it
    is read with, and a run that goes on has to get the same.

    Args:
        teacher: a function of texts, with a width.
        sentences: the texts, by number.
        numbers: those that it may be asked for.
    """

    def __init__(self, teacher: Any, sentences: Sequence[str], numbers: np.ndarray, path: Path) -> None:
        self.teacher, self.sentences, self.numbers = teacher, sentences, np.unique(numbers)
        self.known = np.zeros(-(-len(self.numbers) // BLOCK), dtype=bool)
        self.row = 4 * teacher.width
        self.file = path.open("w+b")
        self.file.truncate(max(1, len(self.numbers) * self.row))
        shape = (len(self.numbers), teacher.width)
        self.embeddings = np.memmap(self.file, dtype=np.float32, mode="r+", shape=shape)

    def __call__(self, numbers: np.ndarray) -> Tensor:
        places = np.searchsorted(self.numbers, numbers)
        blocks = np.unique(places // BLOCK)
        for block in blocks[~self.known[blocks]]:
            here = slice(block * BLOCK, (block + 1) * BLOCK)
            if hasattr(os, "posix_fallocate"):  # on a full disk an error here, where the mapping would end the process
                with of_disk(f"a teacher's embeddings in {self.file.name}"):
                    count = len(self.numbers[here])
                    os.posix_fallocate(self.file.fileno(), int(block) * BLOCK * self.row, count * self.row)
            self.embeddings[here] = self.teacher([self.sentences[i] for i in self.numbers[here]]).float().cpu().numpy()
            self.known[block] = True
        return torch.from_numpy(self.embeddings[places])
