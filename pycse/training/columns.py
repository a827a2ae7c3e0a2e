"""Which columns of a file are anchor, positive and hard negatives: by --columns, by known names, or by their order.

Labels, scores and numbers of rows would train as texts without a word: a column of numbers, of one value or of a few
labels is refused unless --columns names it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pycse.training.errors import UserError
from pycse.training.files import Table

# Names of anchor and positive that people use, in lower case without spaces, _ and -; the first that is there counts.
PAIRS = (
    ("anchor", "positive"), ("sentence", "positive"), ("query", "positive"), ("question", "positive"),
    ("text", "positive"), ("query", "pos"), ("anchor", "pos"), ("query", "answer"), ("question", "answer"),
    ("query", "passage"), ("question", "passage"), ("query", "document"), ("question", "document"),
    ("query", "response"), ("sent0", "sent1"), ("sent1", "sent2"), ("sentence0", "sentence1"),
    ("sentence1", "sentence2"), ("sentencea", "sentenceb"), ("text1", "text2"), ("texta", "textb"),
    ("question1", "question2"), ("premise", "hypothesis"), ("source", "target"), ("title", "abstract"), ("s1", "s2"),
)  # fmt: skip
SINGLES = ("sentence", "text", "anchor", "query", "question")
NEGATIVE = re.compile(r"(hard)?neg(ative)?s?\d*")
# What says whether the texts of a row belong together.
LABELS = {
    "label",
    "labels",
    "goldlabel",
    "score",
    "scores",
    "similarity",
    "similarityscore",
    "relatedness",
    "relatednessscore",
    "isduplicate",
    "entailmentjudgment",
    "class",
    "target",
    "rating",
}
JUDGES = re.compile(r"label|score|simil|paraphras|duplicat|relat|entail|gold|quality")  # in other names of such columns
NOTHING = {"nan", "na", "n/a", "none", "null", "inf", "-inf", "-"}  # where a number is missing  # fmt: skip
INDICES = {"", "unnamed:0", "index", "indexlevel0", "id", "idx", "pairid", "qid", "qid1", "qid2", "genre", "split"}
TEXTS = {name for pair in PAIRS for name in pair} | set(SINGLES)
NUMBER = re.compile(r"[-+]?(\d[\d.,]*|\.\d+)([eE][-+]?\d+)?%?")
SHOWN, LONGEST = 3, 30  # values of a column in an error, characters of each
FEWEST = 3  # rows that say whether a column is constant
# Of a column of labels: at most so many values, each in so many rows on average, of so few words.
LABEL_VALUES, LABEL_ROWS, LABEL_WORDS = 20, 10, 2


@dataclass
class Choice:
    """The columns of a table that are trained on.

    Fields:
        columns: their numbers, from 0: anchor, positive, negatives.
        names: of the columns taken, and of those left out, for people to read.
        header: whether the first row is none of the text.
    """

    columns: list[int]
    taken: tuple[str, ...]
    left_out: tuple[str, ...]
    header: bool


def plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def is_header(row: Sequence[str]) -> bool:
    """Whether a first row names its columns: one has the name of a text, and none is a sentence."""
    names = [plain(cell) for cell in row]
    known = [name in TEXTS | LABELS | INDICES or NEGATIVE.fullmatch(name) is not None for name in names]
    return any(name in TEXTS for name in names) and all(
        good or len(cell.split()) == 1 for good, cell in zip(known, row)
    )


def choose(table: Table, wanted: str | None = None, header: bool | None = None) -> Choice:
    """The columns to train on; UserError, which says what to give, where a table does not say.

    Args:
        wanted: names or numbers from 1, separated by commas, of anchor, positive and negatives.
        header: whether the first row of a file without names of its own has them; None: where they are known ones.
    """
    names, heading = table.names, False
    parts = None if wanted is None else [part.strip() for part in wanted.split(",")]
    if names is None:
        first = table.rows[0][1]
        by_name = parts is not None and not all(part.isdecimal() for part in parts)
        heading = (by_name or is_header(first)) if header is None else header
        names = first if heading else None
    elif header is not None:
        raise UserError(
            f"--{'' if header else 'no-'}header does not go with {table.format}, whose columns have names; leave it out"
        )
    width = len(table.rows[0][1])
    labels = tuple(f"column {k + 1}" if names is None or not names[k] else names[k] for k in range(width))
    rows = table.rows[1:] if heading else table.rows
    if parts is not None:
        columns = [_number(table, part, names, width, heading) for part in parts]
        for part, column in zip(parts, columns):
            if columns.count(column) > 1:
                raise UserError(f"--columns {wanted}: {part} is there more than once; give each column once")
    else:
        columns = _by_name(table, names, labels, rows) if names is not None else list(range(width))
    if not rows:
        raise UserError(f"{table.source} has a header and nothing below it; give one example a line")
    nested = [_short(labels[k]) for k in columns if k in table.nested]
    if nested:
        raise UserError(f"{table.source}: {', '.join(nested)} holds lists or objects; give --columns of texts alone")
    if parts is None:
        _check(table, columns, labels, names, rows)
    taken = tuple(labels[k] for k in columns)
    return Choice(columns, taken, tuple(labels[k] for k in range(width) if k not in columns), heading)


def _number(table: Table, part: str, names: Sequence[str] | None, width: int, heading: bool) -> int:
    if names is not None:
        found = [k for k, name in enumerate(names) if name == part] or [
            k for k, name in enumerate(names) if part and plain(name) == plain(part)
        ]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise UserError(f"--columns: {table.source} has {len(found)} columns {part!r}; give numbers from 1")
    if part.isdecimal() and 1 <= int(part) <= width:
        return int(part) - 1
    there = ", ".join(_short(name) for name in names) if names is not None else f"1 to {width}"
    in_row = f" (its line {table.rows[0][0]})" if heading else ""
    raise UserError(f"--columns: no column {part!r} in {table.source}; there are {there}{in_row}, or numbers from 1")


def _by_name(table: Table, names: Sequence[str], labels: Sequence[str], rows) -> list[int]:
    plains = [plain(name) for name in names]
    pair = next((pair for pair in PAIRS if all(plains.count(name) == 1 for name in pair)), None)
    texts = [k for k, name in enumerate(plains) if name not in INDICES | LABELS and k not in table.nested]
    if pair is not None:
        columns = [plains.index(name) for name in pair]
        columns += [k for k, name in enumerate(plains) if NEGATIVE.fullmatch(name) and k not in columns]
    elif len(texts) == 1:
        columns = texts
    else:
        raise UserError(
            f"{table.source} has the columns {_described(range(len(names)), labels, rows)}; say which of them are "
            f"anchor, positive and negatives, as in --columns {_suggestion(texts, labels, names)}"
        )
    left = [k for k, name in enumerate(plains) if k not in columns and name not in INDICES]
    judged = [
        k for k in left if plains[k] in LABELS or (JUDGES.search(plains[k]) and _no_text([row[k] for _, row in rows]))
    ]
    if judged:
        raise UserError(
            f"{table.source}: {_described(judged, labels, rows)} says which rows belong together, and every row is "
            f"trained on as if it did; leave out the rows that do not, and give --columns "
            f"{_suggestion(columns, labels, names)}"
        )
    return columns


def _check(table: Table, columns: list[int], labels, names, rows) -> None:
    """Refuse columns that are no text."""
    # As they will be trained on: without duplicates and rows that lack a text.
    examples = dict.fromkeys(row for row in (tuple(row[k] for k in columns) for _, row in rows) if all(row))
    odd = {k: why for k, values in zip(columns, zip(*examples)) if (why := _no_text(values)) is not None}
    if not odd:
        return
    k, why = next(iter(odd.items()))
    others = [other for other in columns if other not in odd]
    header = "; if the first line names the columns, --header" if names is None and why == "numbers" else ""
    give = f"give --columns {_suggestion(others, labels, names)}" if others else "give a file of texts"
    raise UserError(
        f"{table.source}: {_described([k], labels, rows)} holds {why}, which is no text to train on; {give}{header}"
        f" (--columns {_suggestion(columns, labels, names)} takes it as it is)"
    )


def _no_text(values: Sequence[str]) -> str | None:
    """What a column holds, where it is no text."""
    count = sum(NUMBER.fullmatch(value) is not None for value in values)
    numbers = count + sum(value.lower() in NOTHING for value in values) if count else 0
    # All but one: the first may be a name.
    if numbers and numbers == len(values) or (numbers == len(values) - 1 >= 2 and not NUMBER.fullmatch(values[0])):
        return "numbers"
    distinct = set(values)
    if len(values) >= FEWEST and len(distinct) == 1:
        return "one value"
    few = len(distinct) <= LABEL_VALUES and len(values) >= LABEL_ROWS * len(distinct)
    return f"{len(distinct)} labels" if few and all(len(value.split()) <= LABEL_WORDS for value in distinct) else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _described(columns, labels, rows) -> str:
    """Names of columns, each with its first values."""
    parts = []
    for k in columns:
        values = dict.fromkeys(row[k] for _, row in rows[: 10 * SHOWN])
        parts.append(f"{_short(labels[k])} ({', '.join(map(_short, list(values)[:SHOWN]))})")
    return ", ".join(parts)


def _suggestion(columns: Sequence[int], labels: Sequence[str], names: Sequence[str] | None) -> str:
    """What to give as --columns: names where they are unmistakable, else numbers."""
    safe = names is not None and all(
        names[k] and "," not in names[k] and names[k] == _short(names[k]) and names.count(names[k]) == 1
        for k in columns
    )
    parts = [labels[k] if safe else str(k + 1) for k in columns] or ["1"]
    return f"'{','.join(parts)}'" if any(" " in part for part in parts) else ",".join(parts)
