"""The text to train on: a user's file or the default Wikipedia sentences, with a count of what was kept and dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pycse.training.errors import UserError

COLUMNS = ("sentence", "positive", "negative")


@dataclass
class Text:
    """Rows of 1 to 3 columns: a sentence; a pair; or a pair with a hard negative.

    Fields:
        source: where the rows came from, for people to read.
        rows: equally long tuples of sentences.
        dropped: reason -> how many lines or sentences were left out for it.
    """

    source: str
    rows: list[tuple[str, ...]]
    dropped: Counter

    @property
    def columns(self) -> tuple[str, ...]:
        return COLUMNS[: len(self.rows[0])] if self.rows else ()

    def with_next(self) -> Text:
        """Pairs of every sentence and the one after it, whose subject is mostly the same."""
        if len(self.columns) != 1:
            raise UserError("--positives next needs single sentences; this text already has pairs, so leave it out")
        pairs: list[tuple[str, ...]] = [(first, second) for (first,), (second,) in pairwise(self.rows)]
        if not pairs:
            raise UserError(f"--positives next needs at least 2 sentences; {self.source} has one")
        return Text(f"{self.source}, each with the next", pairs, self.dropped)

    def dataset(self):
        """The rows as a datasets.Dataset, in memory."""
        from datasets import Dataset

        columns = dict(zip(self.columns, map(list, zip(*self.rows, strict=True)), strict=True))
        return Dataset.from_dict(columns)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of every line of a UTF-8 text file; UserError where it is no such file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a text file")
    if not path.exists():
        raise UserError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with one example a line")
    try:
        # newline="\n": a lone carriage return or a form feed is text, and must not shift the line numbers.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_train_file(path: str | Path) -> Text:
    """Read one example a line: a sentence, or two or three tab-separated columns.

    The first line that is not blank sets the number of columns. Blank lines, lines with an empty column and
    duplicates (which would be false negatives of each other) are dropped and counted.
    """
    dropped: Counter = Counter()
    rows: dict[tuple[str, ...], None] = {}
    width, first = 0, 0
    for number, line in read_lines(path):
        if not line.strip():
            dropped["blank lines"] += 1
            continue
        row = tuple(column.strip() for column in line.split("\t"))
        if not width:
            width, first = len(row), number
        if len(row) > len(COLUMNS):
            raise UserError(
                f"{path}, line {number}: {len(row)} tab-separated columns; use 1 (a sentence), "
                f"2 (a pair) or 3 (a pair and a hard negative)"
            )
        if len(row) != width:
            raise UserError(
                f"{path}, line {number}: number of columns is {len(row)}, but line {first} has {width}; "
                f"give every line the same"
            )
        if not all(row):
            dropped["lines with an empty column"] += 1
        elif row in rows:
            dropped["duplicates"] += 1
        else:
            rows[row] = None
    if not rows:
        raise UserError(f"{path} has no usable line; give one example a line")
    return Text(str(path), list(rows), dropped)


def default_text() -> Text:
    """English Wikipedia sentences from the excerpt that the gensim package carries."""
    from pycse.training.wikipedia import wikipedia_sentences

    sentences, dropped = wikipedia_sentences()
    return Text("English Wikipedia (excerpt in gensim)", [(sentence,) for sentence in sentences], dropped)
