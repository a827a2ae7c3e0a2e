"""Files that are damaged: random bytes, and valid files cut off or with bytes changed. A reader gives what the file
holds or an error that names it; it never crashes, never hangs, and never leaves out silently what it did not
understand."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from fuzz.calls import Fault
from pycse.embedding_cache import HEADER, CacheError, EmbeddingCache
from pycse.model_folder import UntrustedModel, check_folder, transformer_folder
from pycse.pattern import pack_mask
from pycse.sparse.storage import restore, saved_masks
from pycse.training.data import read_train_file
from pycse.training.errors import UserError
from pycse.training.eval_sets import read_eval_file

WIDTH, KEY = 3, "0123456789abcdef" * 4
TEXTS = ("a", "b c", "ü", "", "x\ty", "a\nb")
PIECES = (
    b"\t", b"\n", b"\r\n", b"\r", b"\x00", b"\xff", b"\xef\xbb\xbf", b" ", b"1.5", b"nan", b"-inf", b"a sentence",
    "ü".encode(), b"1e999",
    b"0x10", b"1_0", b"\xe2\x80\xa8", b"\x0c", b"score", "٣".encode(), b"\xed\xa0\x80", b"\x85", b"2",
)  # fmt: skip


def train_bytes(r: random.Random) -> bytes:
    width, words = r.randint(1, 3), (b"one", b"two words", "ü".encode())
    return b"\n".join(b"\t".join(r.choice(words) for _ in range(width)) for _ in range(r.randint(1, 4)))


def eval_bytes(r: random.Random) -> bytes:
    return b"\n".join(b"%d\ta %d\tb" % (k, k) for k in range(r.randint(2, 5))) + b"\n" * r.randint(0, 1)


def damaged(r: random.Random, valid: bytes) -> bytes:
    """Valid, or cut off, or with bytes changed, or nothing that was ever valid."""
    kind = r.randrange(5)
    if kind == 0:
        return valid
    if kind == 1:
        return valid[: r.randrange(len(valid) + 1)]
    if kind == 2:
        changed = bytearray(valid)
        for _ in range(r.randint(1, 4)):
            at = r.randrange(len(changed) + 1)
            changed[at : at + r.randrange(3)] = r.choice(PIECES)
        return bytes(changed)
    if kind == 3:
        return b"".join(r.choice(PIECES) for _ in range(r.randint(0, 12)))
    return r.randbytes(r.randint(0, 64))


def lines_of(content: bytes) -> list[str] | None:
    """What a text file holds by its definition: UTF-8, one line between line feeds; None where it is no text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return [line.rstrip("\r\n") for line in text.split("\n")]


def train_file(r: random.Random, folder: Path) -> None:
    content = damaged(r, train_bytes(r))
    path = folder / "train.tsv"
    path.write_bytes(content)
    try:
        text = read_train_file(path)
    except UserError as error:
        return _named(error, path)
    lines = lines_of(content)
    if lines is None:
        raise Fault(f"read_train_file took {content!r}, which is no UTF-8")
    rows = [tuple(c.strip() for c in line.split("\t")) for line in lines if line.strip()]
    wanted = list(dict.fromkeys(row for row in rows if all(row)))
    if text.rows != wanted or sum(text.dropped.values()) + len(wanted) not in (len(lines), len(lines) - 1):
        raise Fault(f"read_train_file made {text.rows} and dropped {dict(text.dropped)} of {content!r}")


def formats_bytes(r: random.Random, suffix: str) -> bytes:
    rows = [[r.choice(("one", "two words", 'ü"', "a,b", "c\nd", "")) for _ in range(2)] for _ in range(r.randint(1, 5))]
    if suffix == "csv":
        cells = [["anchor", "positive"], *rows]
        return "\n".join(",".join('"' + c.replace('"', '""') + '"' for c in row) for row in cells).encode()
    if suffix == "jsonl":
        kinds = ({"query": "a", "pos": None}, ["a", "b"], "a", 4, {"text": ["a"]}, {})
        values = [dict(zip(("anchor", "positive"), row)) for row in rows] + [r.choice(kinds)] * r.randrange(2)
        return "\n".join(json.dumps(value, ensure_ascii=r.random() < 0.5) for value in values).encode()
    written = io.BytesIO()
    columns = {name: list(column) for name, column in zip(("anchor", "positive"), zip(*rows))}
    pyarrow.parquet.write_table(pyarrow.table(columns), written)
    return written.getvalue()


def formats_file(r: random.Random, folder: Path) -> None:
    """CSV, JSONL and Parquet, gzipped or not: rows of texts, or one error."""
    suffix = r.choice(("csv", "jsonl", "parquet"))
    content = damaged(r, formats_bytes(r, suffix))
    packed = r.random() < 0.2
    path = folder / f"train.{suffix}{'.gz' if packed else ''}"
    path.write_bytes(damaged(r, gzip.compress(content)) if packed else content)
    try:
        text = read_train_file(path)
    except UserError as error:
        return _named(error, path)
    cells = [cell for row in text.rows for cell in row]
    if not cells or any(not cell or cell != cell.strip() for cell in cells) or len({len(row) for row in text.rows}) > 1:
        raise Fault(f"read_train_file made {text.rows} of {content!r}")
    "".join(cells).encode()


def eval_file(r: random.Random, folder: Path) -> None:
    content = damaged(r, eval_bytes(r))
    path = folder / "eval.tsv"
    path.write_bytes(content)
    try:
        pairs = read_eval_file(path)
    except UserError as error:
        return _named(error, path)
    lines = lines_of(content)
    if lines is None:
        raise Fault(f"read_eval_file took {content!r}, which is no UTF-8")
    rows = [[c.strip() for c in line.split("\t")] for line in lines if line.strip()]
    scored = [row for row in rows if row[0]]
    header = len(scored) - len(pairs.scores)
    if header not in (0, 1) or len(rows) - len(scored) != pairs.skipped or not all(map(math.isfinite, pairs.scores)):
        raise Fault(f"read_eval_file made {pairs.scores} of {content!r}")
    if [(float(a), b, c) for a, b, c in scored[header:]] != list(zip(pairs.scores, pairs.first, pairs.second)):
        raise Fault(f"read_eval_file made {list(zip(pairs.scores, pairs.first, pairs.second))} of {content!r}")


def cache_file(r: random.Random, folder: Path) -> None:
    """A damaged record is embedded again, never used; a damaged header is refused; an append puts right what is cut
    off."""
    path = folder / f"{KEY[:32]}.embeddings"
    path.unlink(missing_ok=True)
    cache = EmbeddingCache(folder, KEY, WIDTH)
    vectors = {text: np.array([k, k + 0.5, -k], np.float32) for k, text in enumerate(TEXTS)}
    cache.add(TEXTS, np.stack(list(vectors.values())))
    del cache
    valid = path.read_bytes()
    content = damaged(r, valid)
    path.write_bytes(content)
    try:
        cache = EmbeddingCache(folder, KEY, WIDTH)
    except CacheError as error:
        if content[:HEADER] == valid[:HEADER]:
            raise Fault(f"the cache refused a file with a right header: {error}") from error
        return _named(error, path)
    for text, vector in vectors.items():
        found = cache.get(text)
        if found is not None and not np.array_equal(found, vector):
            raise Fault(f"the cache gave {found} for {text!r}")
    cache.add(["new"], np.full((1, WIDTH), 7, np.float32))
    again = EmbeddingCache(folder, KEY, WIDTH)
    found = again.get("new")
    if found is None or not (found == 7).all():
        raise Fault(f"the cache lost what was added after {len(content)} bytes")


def mask_file(r: random.Random, folder: Path) -> None:
    """What pycse.sparse.load reads itself: masks in safetensors, and modules.json."""
    path = folder / "model.safetensors"
    g = torch.Generator().manual_seed(r.randrange(1 << 30))
    mask = torch.rand(4, 5, generator=g) < 0.5
    save_file({"0.mask_bits": pack_mask(mask), "0.weight": torch.ones(4, 5)}, path)
    path.write_bytes(damaged(r, path.read_bytes()))
    model = torch.nn.Sequential(torch.nn.Linear(5, 4, device="cpu"))
    before = model[0]
    try:
        masks = saved_masks(folder)
        restore(model, masks)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError) or model[0] is not before:
            raise Fault(f"restore raised {type(error).__name__} and changed the model: {error}") from error
        if "safetensors" not in str(error) and "mask_bits" not in str(error):
            raise Fault(f"saved_masks raised {type(error).__name__} without naming the file: {error}") from error
    except Exception as error:
        raise Fault(f"saved_masks raised {type(error).__name__}: {error}") from error


def modules_file(r: random.Random, folder: Path) -> None:
    path = folder / "modules.json"
    valid = json.dumps(
        [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    ).encode()
    path.write_bytes(damaged(r, valid))
    try:
        found = transformer_folder(folder)
    except ValueError as error:
        if "modules.json" not in str(error):
            raise Fault(f"transformer_folder raised {type(error).__name__} without naming the file: {error}") from error
        return
    except Exception as error:
        raise Fault(f"transformer_folder raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Path):
        raise Fault(f"transformer_folder gave {found!r}")


def settings_file(r: random.Random, folder: Path) -> None:
    """A model's configuration, as check_folder sees it."""
    path = folder / "config.json"
    valid = json.dumps({"model_type": "bert", "text_config": {"sizes": [1, 2]}, "attn_implementation": "sdpa"}).encode()
    path.write_bytes(damaged(r, valid))
    try:
        check_folder(folder)
    except UntrustedModel as error:
        if "config.json" not in str(error):
            raise Fault(f"check_folder raised {type(error).__name__} without naming the file: {error}") from error
    except Exception as error:
        raise Fault(f"check_folder raised {type(error).__name__}: {error}") from error


def _named(error: UserError, path: Path) -> None:
    if path.name not in str(error) or "\n" in str(error).replace(str(path), ""):
        raise Fault(f"{type(error).__name__} without the file, or of several lines: {error}")


READERS: dict[str, Callable[[random.Random, Path], None]] = {
    "train_file": train_file, "formats_file": formats_file, "eval_file": eval_file, "cache_file": cache_file, "mask_file": mask_file,
    "modules_file": modules_file, "settings_file": settings_file,
}  # fmt: skip


def describe(c: Any) -> dict[str, Any]:
    return dict(reader=c.pick(tuple(READERS)), seed=c.whole(0, 1 << 30))


def run(d: dict[str, Any], folder: Path) -> None:
    name = d["reader"]
    own = folder / name
    own.mkdir(exist_ok=True)
    try:
        READERS[name](random.Random(d["seed"]), own)
    except (Fault, UserError):
        raise
    except Exception as error:
        raise Fault(f"{name} raised {type(error).__name__}: {error}") from error
