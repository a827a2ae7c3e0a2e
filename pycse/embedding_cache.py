"""Teachers' embeddings on disk: one append-only file a teacher, safe to kill and to share between runs.

    file     FOLDER/KEY.embeddings: a header of 512 bytes, then records of one size
    header   JSON padded with spaces: format, key, width. A file whose header is another's is never read
    record   sha256 of the text (32 bytes) | embedding (D little-endian float32) | records of its batch after it (4
             bytes) | CRC-32 of all that (4 bytes)
    key      sha256 of all that an embedding depends on (sentence_transformers/cached_teacher.py)

Texts that were embedded together are appended together. Of a batch that a killed run began to write nothing is used,
and the next append cuts it off: its last bits depend on what was read together, and a run that goes on reads the same
batch again. A record whose CRC fails is not used either; its sentence is embedded again. Appends are made under a lock
on KEY.lock, so several runs, and the processes of one, can share a folder; each takes in what the others appended.
Reading maps the file into memory; the index (text -> record) costs about 150 bytes of memory a sentence and one pass
over the file when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

FORMAT = "pycse teacher embeddings 2"
HEADER = 512


class CacheError(ValueError):
    """A file of embeddings that cannot be used, or a folder that cannot be written."""


class EmbeddingCache:
    """Text -> embedding of one teacher, kept in a file.

    Args:
        folder: made if it is not there.
        key: hexadecimal name of the teacher and of everything else that its embeddings depend on.
        width: size of an embedding.

    Raises:
        CacheError: the folder cannot be written; or its file of that name is another teacher's.
    """

    def __init__(self, folder: str | Path, key: str, width: int):
        self.path = Path(folder) / f"{key[:32]}.embeddings"
        self.record = np.dtype([("text", "V32"), ("embedding", "<f4", (width,)), ("left", "<u4"), ("crc", "<u4")])
        header = {"format": FORMAT, "key": key, "width": width}
        self.header = json.dumps(header).ljust(HEADER - 1).encode() + b"\n"
        self.index: dict[bytes, int] = {}
        self.records = np.empty(0, self.record)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path.with_suffix(".lock"))
            with self.lock, self.path.open("ab") as file:
                if file.tell() < HEADER:  # new, or killed while it was made
                    file.truncate(0)
                    file.write(self.header)
            with self.path.open("rb") as file:
                found = file.read(HEADER)
        except OSError as error:
            raise unusable(self.path, error, "write") from error
        if found != self.header:
            raise CacheError(
                f"{self.path} does not hold embeddings of this teacher; delete the file or give another folder"
            )
        self.follow()

    def __len__(self) -> int:
        return len(self.index)

    def get(self, text: str) -> np.ndarray | None:
        """The embedding of a text, (D,) float32, or None."""
        name = digest(text)
        row = self.index.get(name)
        if row is None:
            return None
        record = self.records[row]
        return record["embedding"] if record["crc"] == checksum(name, record) else None

    def add(self, texts: Sequence[str], embeddings: np.ndarray) -> None:
        """Append the embeddings of texts, (n, D). CacheError where the file cannot be written."""
        new = np.empty(len(texts), self.record)
        for i, text in enumerate(texts):
            name = digest(text)
            new["text"][i] = np.void(name)
            new["embedding"][i] = embeddings[i]
            new["left"][i] = len(texts) - 1 - i
            new["crc"][i] = checksum(name, new[i])
        try:
            with self.lock, self.path.open("r+b") as file:
                file.truncate(HEADER + self.whole(file.seek(0, 2)) * self.record.itemsize)
                file.seek(0, 2)
                file.write(new.tobytes())
        except OSError as error:
            raise unusable(self.path, error, "write") from error
        self.follow()

    def whole(self, size: int) -> int:
        """Records of whole batches in a file of so many bytes."""
        rows = max(0, size - HEADER) // self.record.itemsize
        with self.path.open("rb") as file:  # read, not mapped: another run may cut it off meanwhile
            while rows:
                file.seek(HEADER + (rows - 1) * self.record.itemsize)
                record = file.read(self.record.itemsize)
                if len(record) == self.record.itemsize and not np.frombuffer(record, self.record)["left"][0]:
                    break
                rows -= 1
        return rows

    def follow(self) -> None:
        """Take in the whole records that this run or another has appended; the latest of a text counts.

        CacheError where the file cannot be read.
        """
        try:
            rows = self.whole(self.path.stat().st_size)
            if rows <= len(self.records):
                return
            known = len(self.records)
            self.records = np.memmap(self.path, self.record, "r", HEADER, (rows,))
        except OSError as error:
            raise unusable(self.path, error, "read") from error
        for row, name in enumerate(self.records["text"][known:], known):
            self.index[name.tobytes()] = row


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def checksum(name: bytes, record: Any) -> int:
    return zlib.crc32(record["left"].tobytes(), zlib.crc32(record["embedding"].tobytes(), zlib.crc32(name)))


def unusable(path: Path, error: OSError, what: str) -> CacheError:
    return CacheError(f"cannot {what} {path} ({error.strerror or error}); give another folder")


def key_of(parts: dict[str, Any], tensors: dict[str, Any]) -> str:
    """sha256 of a JSON-able description and of named tensors: their names, types, shapes and bits."""
    import torch

    state = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
