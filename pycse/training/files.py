"""Files of examples as rows of cells: text, TSV, CSV, JSONL and Parquet, plain or gzipped, from disk or from a pipe.

    .txt .tsv   cells between tabs; quotes are text; a line ends at a line feed
    .csv        commas, double quotes around cells that hold commas, quotes or line feeds (RFC 4180)
    .jsonl      an object, an array of strings or a string a line
    .parquet    as pyarrow reads it

Rows are read into memory and nowhere else: `datasets` would keep a copy of every file in the user's cache.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pycse.training.errors import UserError

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}

KINDS: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}  # of JSON that are a row
UNREADABLE = (OSError, EOFError, zlib.error)  # of a file, and of a gzipped one


@dataclass
class Table:
    """Rows of a file.

    Fields:
        source: the file, for people to read.
        format: one of FORMATS.
        rows: (number of the line or record, from 1; cells without white space around them).
        names: of the columns, where the format has them.
        nested: numbers of columns with lists or objects in a cell, which is then empty.
        dropped: reason -> count of lines without a cell.
    """

    source: str
    format: str
    rows: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    names: tuple[str, ...] | None = None
    nested: set[int] = field(default_factory=set)
    dropped: Counter = field(default_factory=Counter)

    @property
    def unit(self) -> str:
        return "row" if self.format == "parquet" else "line"


def user_path(path: str | Path) -> Path:
    """A path as people write it; a shell leaves the ~ of --option=~/x as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None


def is_stream(path: str | Path) -> bool:
    """Whether a file can be read only once: a pipe, a terminal, a socket."""
    try:
        mode = user_path(path).stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def opened(path: str | Path) -> IO[bytes]:
    """A file to read bytes from, which is not empty and can seek; UserError where there is none. A pipe is read to its
    end."""
    shown, path = path, user_path(path)
    file: IO[bytes]
    try:
        if path.is_dir():
            raise UserError(f"{shown} is a folder; give a text file")
        if is_stream(path):
            with path.open("rb", buffering=0) as pipe:
                if pipe.isatty():
                    raise UserError(f"{shown} is a terminal; give a file, or a pipe as in --train-file <(zcat text.gz)")
                content = pipe.readall()
            size, file = len(content or b""), io.BytesIO(content or b"")
        else:
            file = path.open("rb")
            size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"no such file: {shown}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown}: {getattr(error, 'strerror', None) or error}") from None
    if size == 0:
        file.close()
        raise UserError(f"{shown} is empty; give a file with one example a line")
    return gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[return-value]


def format_of(path: str | Path, given: str | None = None) -> str:
    """By the name, where it is not given: .txt for a pipe and for suffixes that nobody knows."""
    if given is not None:
        return given
    path = Path(path)
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    return SUFFIXES.get(suffix, "txt")


def decoded(path: str | Path, newline: str = "\n") -> Iterator[str]:
    """Lines of a UTF-8 file with their ends; UserError where it is no such file."""
    try:
        with opened(path) as file:
            # newline="\n": a lone carriage return or a form feed is text, and must not shift the line numbers.
            yield from io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from None
    except UNREADABLE as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of every line of a UTF-8 text file; UserError where it is no such file."""
    for number, line in enumerate(decoded(path), 1):
        yield number, line.rstrip("\r\n")


def read_table(path: str | Path, format: str | None = None) -> Table:
    """All rows of a file, of one width; UserError, which names the line, for what cannot be read.

    Args:
        format: one of FORMATS; default: by the file's name.
    """
    table = Table(str(path), format_of(path, format))
    {"jsonl": _read_jsonl, "parquet": _read_parquet, "csv": _read_csv}.get(table.format, _read_tabs)(table, path)
    if not table.rows or not table.rows[0][1]:
        raise UserError(f"{path} has no usable line; give one example a line")
    return table


def _add(table: Table, number: int, cells: Sequence[str]) -> None:
    row = tuple(cell.strip() for cell in cells)
    if table.rows and len(row) != len(table.rows[0][1]):
        first, one = table.rows[0]
        hint = "; quote cells that hold commas, or give --format txt for plain text" if table.format == "csv" else ""
        raise UserError(
            f"{table.source}, line {number}: number of columns is {len(row)}, but line {first} has {len(one)}; "
            f"give every line the same{hint}"
        )
    table.rows.append((number, row))


def _read_tabs(table: Table, path: str | Path) -> None:
    for number, line in read_lines(path):
        if line.strip():
            _add(table, number, line.split("\t"))
        else:
            table.dropped["blank lines"] += 1


def _read_csv(table: Table, path: str | Path) -> None:
    lines = decoded(path, newline="")  # the reader sees the line ends inside quotes as they are
    reader = csv.reader(lines, strict=True)
    number = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # An open quote takes in everything behind it.
            raise UserError(
                f"{path}, line {number}: {error}; double the quotes inside a quoted cell, or give --format tsv "
                "or txt, where quotes are text"
            ) from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells) and len(cells) < 2:
            table.dropped["blank lines"] += 1
        elif not table.rows and len(cells) == 1 and "\t" in cells[0]:
            raise UserError(f"{path}, line {number} has tabs and no commas; give --format tsv")
        elif not table.rows and len(cells) == 1 and semicolons(cells[0]):
            raise UserError(f"{path}, line {number} is separated by semicolons; write commas, and quote what has them")
        else:
            _add(table, number, cells)
        number = reader.line_num + 1


def semicolons(line: str) -> bool:
    """Whether a line without commas is columns all the same: short words between semicolons, as names are."""
    parts = [part.strip() for part in line.split(";")]
    return len(parts) > 1 and all(part and len(part.split()) <= 2 for part in parts)


def _read_jsonl(table: Table, path: str | Path) -> None:
    """Objects, whose keys name the columns; or arrays, or strings, which have no names."""
    names: dict[str, int] = {}
    first: str | None = None
    for number, line in read_lines(path):
        if not line.strip():
            table.dropped["blank lines"] += 1
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({getattr(error, 'msg', error)})") from None
        kind = KINDS.get(type(value))
        if kind is None:
            raise UserError(f"{path}, line {number}: give an object, an array of strings or a string a line")
        first = first or kind
        if kind != first:
            raise UserError(f"{path}, line {number} is {kind}, but the first is {first}; give every line the same")
        if isinstance(value, dict):
            for name in value:
                names.setdefault(name, len(names))
            # Lines may lack keys, and have new ones; the rows before get those below.
            table.rows.append((number, tuple(_cell(table, k, value.get(name)) for name, k in names.items())))
        else:
            cells = [value] if isinstance(value, str) else value
            _add(table, number, [_cell(table, k, cell) for k, cell in enumerate(cells)])
        if not all(map(_encodable, table.rows[-1][1])):
            raise UserError(f"{path}, line {number} holds a lone surrogate (\\ud800 to \\udfff), which is no text")
    if names:
        table.names = tuple(names)
        table.rows = [(number, row + ("",) * (len(names) - len(row))) for number, row in table.rows]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cell(table: Table, column: int, value: Any) -> str:
    if isinstance(value, (list, dict, tuple, set)):
        table.nested.add(column)
        return ""
    if isinstance(value, bytes):  # of Parquet writers that do not mark text as text
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UserError(f"{table.source}: column {column + 1} holds bytes that are no text; leave it out") from None
    return "" if value is None else str(value).strip()


def _read_parquet(table: Table, path: str | Path) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        with opened(path) as file:
            content = pyarrow.parquet.ParquetFile(file)
            table.names = tuple(content.schema_arrow.names)
            number = 0
            for batch in content.iter_batches():
                columns = [column.to_pylist() for column in batch.columns]
                for values in zip(*columns, strict=True):
                    number += 1
                    table.rows.append((number, tuple(_cell(table, k, value) for k, value in enumerate(values))))
    except (pyarrow.ArrowException, *UNREADABLE, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no Parquet file that can be read ({reason})") from None
