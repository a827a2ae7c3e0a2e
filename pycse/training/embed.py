"""Embeddings of a file's lines as a .npy file, written as they are made: memory does not grow with the file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pycse.training.errors import UserError
from pycse.training.files import read_lines
from pycse.training.new_file import new_file

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHUNK = 64  # batches that are sorted by length together


def header(rows: int, width: int) -> bytes:
    """Of a float32 array. numpy leaves room for any number of rows, so the length is always the same."""
    import numpy as np

    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
    return written.getvalue()


def encode_file(
    encoder: SentenceTransformer,
    source: str | Path,
    out: Path,
    *,
    batch_size: int,
    prompt: str | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    said: Callable[[int], object] = lambda rows: None,
) -> tuple[int, int]:
    """Write the embedding of every line, blank ones too: row i is line i + 1.

    Args:
        source: one text a line, UTF-8; it may be a pipe.
        out: new .npy file, (lines, features) in float32.
        prompt, normalize, truncate_dim: as SentenceTransformer.encode; embeddings are cut before they are normalised.
        said: called with the number of rows so far.

    Returns:
        (lines, features).
    """
    width = encoder.get_embedding_dimension()
    if truncate_dim is not None and width is not None and truncate_dim > width:
        raise UserError(f"--truncate-dim is {truncate_dim}; this model's embeddings have {width} features")
    lines: Iterator[str] = (line for _, line in read_lines(source))
    first = list(islice(lines, CHUNK * batch_size))
    rows, found = 0, 0
    with new_file("out", out) as file:
        chunk = first
        while chunk:
            z = encoder.encode(
                chunk,
                batch_size=batch_size,
                prompt=prompt,
                normalize_embeddings=normalize,
                truncate_dim=truncate_dim,
                convert_to_numpy=True,
                show_progress_bar=False,
            ).astype("<f4")
            if not rows:
                found = z.shape[1]
                file.write(header(0, found))
            file.write(z.tobytes())
            rows += len(z)
            said(rows)
            chunk = list(islice(lines, CHUNK * batch_size))
        file.seek(0)
        file.write(header(rows, found))
    return rows, found
