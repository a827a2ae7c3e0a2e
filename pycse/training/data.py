"""The text to train on: a user's file or the default Wikipedia sentences, with a count of what was kept and dropped."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from pycse.training.choices import SWITCHED
from pycse.training.columns import choose
from pycse.training.errors import UserError
from pycse.training.files import read_table

UNITS = ("sentences", "pairs", "pairs with a hard negative")
KEPT = b"pycse text"  # of the schema of a file that Text.save writes


@dataclass
class Text:
    """Rows of a sentence; of a pair; or of a pair with hard negatives.

    Fields:
        source: where the rows came from, for people to read.
        rows: equally long tuples of sentences.
        dropped: reason -> how many lines or sentences were left out for it.
        taken: names of the file's columns, as they were understood; empty where there was nothing to understand.
        left_out: names of the file's other columns.
    """

    source: str
    rows: list[tuple[str, ...]]
    dropped: Counter
    taken: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """sentence, positive, negative, negative_2, ..."""
        width = len(self.rows[0]) if self.rows else 0
        return ("sentence", "positive", "negative", *(f"negative_{k}" for k in range(2, width - 1)))[:width]

    @property
    def unit(self) -> str:
        """What a row is, for people to read."""
        negatives = len(self.columns) - 2
        return f"pairs with {negatives} hard negatives" if negatives > 1 else UNITS[len(self.columns) - 1]

    @cached_property
    def repeated(self) -> int:
        """Texts that stand in several rows."""
        counts = Counter(text for row in self.rows for text in set(row))
        return sum(count > 1 for count in counts.values())

    @cached_property
    def by_dropout(self) -> bool:
        """Whether only dropout tells the two views of a row apart: sentences, or pairs of a sentence with itself."""
        return len(self.columns) == 1 or all(row[0] == row[1] for row in self.rows)

    def with_next(self) -> Text:
        """Pairs of every sentence and the one after it, whose subject is mostly the same."""
        self.check_single("next")
        pairs: list[tuple[str, ...]] = [(first, second) for (first,), (second,) in pairwise(self.rows)]
        if not pairs:
            raise UserError(f"--positives next needs at least 2 sentences; {self.source} has one")
        return Text(f"{self.source}, each with the next", pairs, self.dropped, self.taken, self.left_out)

    def with_switched_case(self, seed: int) -> Text:
        """Pairs of every sentence and itself, where some words' first letters have the other case: a tokenizer that
        knows case sees other tokens (CARDS' augmentation: Wang et al., SIGIR 2022). The words are drawn once."""
        self.check_single("switch-case")
        drawn = random.Random(seed)

        def switched(word: re.Match[str]) -> str:
            return word[0][:1].swapcase() + word[0][1:] if drawn.random() < SWITCHED else word[0]

        pairs: list[tuple[str, ...]] = [(sentence, re.sub(r"\S+", switched, sentence)) for (sentence,) in self.rows]
        return Text(f"{self.source}, each with its case switched", pairs, self.dropped, self.taken, self.left_out)

    def check_single(self, positives: str) -> None:
        if len(self.columns) != 1:
            raise UserError(
                f"--positives {positives} needs single sentences; this text already has pairs, so leave it out"
            )

    def dataset(self):
        """The rows as a datasets.Dataset, in memory."""
        from datasets import Dataset

        columns = dict(zip(self.columns, map(list, zip(*self.rows, strict=True)), strict=True))
        return Dataset.from_dict(columns)

    def fingerprint(self) -> str:
        """sha256 of the rows, in their order: equal where a run would train on the same."""
        found = hashlib.sha256()
        for row in self.rows:
            for text in row:
                content = text.encode()
                found.update(len(content).to_bytes(8, "little"))
                found.update(content)
            found.update(b"\n")
        return found.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a Parquet file with all of it, for a run that goes on when its pipe is gone."""
        import pyarrow
        import pyarrow.parquet

        about = {
            "source": self.source,
            "dropped": list(self.dropped.items()),
            "taken": self.taken,
            "left_out": self.left_out,
        }
        columns = {name: list(column) for name, column in zip(self.columns, zip(*self.rows, strict=True), strict=True)}
        schema = pyarrow.schema(
            [(name, pyarrow.large_string()) for name in columns], {KEPT: json.dumps(about).encode()}
        )
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), path)

    @classmethod
    def load(cls, path: str | Path) -> Text:
        """What :meth:`save` wrote; UserError where it is no such file."""
        import pyarrow
        import pyarrow.parquet

        try:
            with open(path, "rb") as file:
                table = pyarrow.parquet.read_table(file)
            about = json.loads(table.schema.metadata[KEPT])
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} is no text of a run ({str(error).splitlines()[0]})") from None
        rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        names = (tuple(about[name]) for name in ("taken", "left_out"))
        return cls(about["source"], rows, Counter(dict(about["dropped"])), *names)


def read_train_file(
    path: str | Path, format: str | None = None, columns: str | None = None, header: bool | None = None
) -> Text:
    """Read one example a row: a sentence, a pair, or a pair and its hard negatives.

    Rows with an empty column and duplicates (which would be false negatives of each other) are dropped and counted.

    Args:
        path: a file of pycse.training.files, or a pipe, which is read once.
        format: one of its FORMATS; default: by the file's name.
        columns, header: pycse.training.columns.choose.
    """
    table = read_table(path, format)
    choice = choose(table, columns, header)
    dropped = table.dropped
    if choice.header:
        dropped["header"] += 1
    rows: dict[tuple[str, ...], None] = {}
    for _, row in table.rows[choice.header :]:
        example = tuple(row[k] for k in choice.columns)
        if not all(example):
            dropped[f"{table.unit}s with an empty column"] += 1
        elif example in rows:
            dropped["duplicates"] += 1
        else:
            rows[example] = None
    if not rows:
        raise UserError(f"{path} has no usable {table.unit}; give one example a {table.unit}")
    plain = table.names is None and not choice.header and not choice.left_out and columns is None
    return Text(str(path), list(rows), dropped, () if plain else choice.taken, choice.left_out)


def default_text() -> Text:
    """English Wikipedia sentences from the excerpt that the gensim package carries."""
    from pycse.training.wikipedia import wikipedia_sentences

    sentences, dropped = wikipedia_sentences()
    return Text("English Wikipedia (excerpt in gensim)", [(sentence,) for sentence in sentences], dropped)
