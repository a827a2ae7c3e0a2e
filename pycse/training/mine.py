"""Hard negatives for pairs: texts that an encoder finds near an anchor and that are not its positives.

The search is sentence-transformers' mine_hard_negatives. Sentences without a pair are their own positives, as in
SimCSE, and get their neighbours as negatives (CARDS' retrieved negatives: Wang et al., SIGIR 2022).
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pycse.training.data import Text
from pycse.training.errors import UserError
from pycse.training.new_file import new_file

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SUFFIXES = (".tsv", ".csv", ".jsonl")
SAMPLING = ("top", "random")
SIMILARITIES = 1 << 27  # that are in memory at a time, 4 bytes each


@dataclass(frozen=True)
class Mining:
    """How negatives are chosen.

    Fields:
        negatives: a row.
        skip: nearest texts that are left out, since the nearest are often positives that nobody has marked.
        depth: nearest texts that are looked at; None: as many as are needed.
        margin: a negative is at least so much less similar to the anchor than its positive.
        relative_margin: the same as a share of the positive's similarity.
        least, most: similarity of a negative to the anchor.
        sampling: the nearest of those that are left, or a random choice.
    """

    negatives: int = 1
    skip: int = 0
    depth: int | None = None
    margin: float | None = None
    relative_margin: float | None = None
    least: float | None = None
    most: float | None = None
    sampling: str = "top"

    def check(self) -> None:
        """Raise UserError for what is out of its range or does not go together."""
        if self.negatives < 1:
            raise UserError(f"--negatives is {self.negatives}; it must be at least 1")
        if self.skip < 0:
            raise UserError(f"--skip is {self.skip}; it must be at least 0")
        if self.depth is not None and self.depth < self.skip + self.negatives:
            raise UserError(
                f"--depth is {self.depth}; it must be at least --skip and --negatives together, "
                f"{self.skip + self.negatives}"
            )
        if self.sampling not in SAMPLING:
            raise UserError(f"--sampling {self.sampling}: unknown; use one of {', '.join(SAMPLING)}")
        for name in ("margin", "relative_margin", "least", "most"):
            value = getattr(self, name)
            if value is not None and not -2 <= value <= 2:  # not of nan either
                raise UserError(f"--{name.replace('_', '-')} is {value:g}; cosines differ by 2 at most")


@contextmanager
def quiet_bars() -> Iterator[None]:
    """The progress bars of mine_hard_negatives, which it cannot leave out, belong on a terminal alone."""
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def mine(
    encoder: SentenceTransformer,
    text: Text,
    mining: Mining,
    *,
    corpus: list[str] | None = None,
    batch_size: int = 64,
    prompts: tuple[str | None, str | None] = (None, None),
    seed: int = 42,
) -> list[tuple[str, ...]]:
    """Rows of anchor, positive and negatives, without those that have too few.

    Args:
        text: sentences or pairs.
        corpus: where negatives come from, beside the positives.
        prompts: before anchors, and before all others.
    """
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives
    from transformers import set_seed

    pairs = [(row[0], row[-1]) for row in text.rows]
    known = {positive for _, positive in pairs} | set(corpus or ())
    # An anchor that is among the candidates would be its own nearest text: as one more positive it is left out.
    own = dict.fromkeys((anchor, anchor) for anchor, _ in pairs if anchor in known)
    given = list(dict.fromkeys([*pairs, *own]))
    set_seed(seed)
    try:
        with quiet_bars():
            found = mine_hard_negatives(
                Dataset.from_dict({"anchor": [a for a, _ in given], "positive": [p for _, p in given]}),
                encoder,
                corpus=corpus,
                range_min=mining.skip,
                range_max=mining.depth,
                absolute_margin=mining.margin,
                relative_margin=mining.relative_margin,
                min_score=mining.least,
                max_score=mining.most,
                num_negatives=mining.negatives,
                sampling_strategy=mining.sampling,  # type: ignore[arg-type]
                query_prompt=prompts[0],
                corpus_prompt=prompts[1],
                output_format="n-tuple",
                batch_size=batch_size,
                faiss_batch_size=max(1, min(16384, SIMILARITIES // (len(known) + len(own)))),
                verbose=False,
            )
    except ValueError as error:
        raise UserError(f"{text.source}: {error}") from error
    wanted = set(pairs)
    columns = [found[name] for name in found.column_names]
    rows = [tuple(row) for row in zip(*columns) if (row[0], row[1]) in wanted]
    if not rows:
        raise UserError(
            f"{text.source}: no row has {mining.negatives} texts near it that may be negatives; give a larger --depth, "
            "smaller margins, or more text in --corpus"
        )
    return rows


def check_texts(text: Text, corpus: list[str] | None, out: Path) -> None:
    """Raise UserError where a TSV cannot hold the texts, before they are embedded."""
    if out.suffix.lower() != ".tsv":
        return
    for one in [*(cell for row in text.rows for cell in row), *(corpus or ())]:
        if any(character in one for character in "\t\r\n"):
            raise UserError(f"--out {out}: {one[:40]!r} holds a tab or a line end; give a name that ends with .jsonl")


def lines(rows: list[tuple[str, ...]], suffix: str) -> Iterator[str]:
    """The lines of a file that `pycse train --train-file` reads, with names of its columns."""
    names = ("anchor", "positive", *(f"negative_{k}" for k in range(1, len(rows[0]) - 1)))
    if suffix == ".jsonl":
        yield from (json.dumps(dict(zip(names, row)), ensure_ascii=False) + "\n" for row in rows)
        return
    for row in [names, *rows]:
        if suffix == ".tsv":
            yield "\t".join(row) + "\n"
        else:
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow(row)
            yield line.getvalue()


def write_rows(rows: list[tuple[str, ...]], out: Path) -> None:
    with new_file("out", out) as file:
        file.writelines(line.encode() for line in lines(rows, out.suffix.lower()))
