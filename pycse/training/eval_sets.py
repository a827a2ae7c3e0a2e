"""Pairs of texts that people have scored: the Lee documents that come with gensim, and files of the user's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pycse.training.columns import LABELS, PAIRS, plain
from pycse.training.errors import UserError
from pycse.training.files import format_of, read_lines, read_table, user_path

# Of a first line's score: letters that stand for no score, not for the name of a column.
NO_SCORES = {"nan", "na", "n/a", "none", "null", "inf", "infinity", "-inf"}
STSB = (4, 5, 6)  # score and sentences of STS-B's own files; licences may stand behind them
STSB_TOP = 5.0
SICK = (3, 1, 2)
SICK_LABELS = {"NEUTRAL", "ENTAILMENT", "CONTRADICTION"}
GIVE = "give score, sentence1 and sentence2, separated by tabs, or a first line that names its columns so"


@dataclass
class ScoredPairs:
    """Pairs of texts with human similarity scores.

    Fields:
        top: the top of the scale of the scores.
        skipped: pairs of the source that nobody has scored.
        parts: name of a part -> (first pair, behind the last), where the set is made of several.
    """

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]
    top: float
    skipped: int = 0
    parts: dict[str, tuple[int, int]] | None = None


def lee_pairs() -> ScoredPairs:
    """All 1225 pairs of the 50 news documents judged by Lee, Pincombe & Welsh (2005), as gensim carries them."""
    import numpy as np
    from gensim.test.utils import datapath

    # The documents are in Latin-1 (one has a pound sign). The matrix holds its upper triangle only.
    documents = Path(datapath("lee.cor")).read_text(encoding="latin-1").splitlines()
    similarity = np.loadtxt(datapath("similarities0-1.txt"))
    rows, columns = np.triu_indices(len(documents), k=1)
    return ScoredPairs(
        name="lee",
        first=[documents[i] for i in rows],
        second=[documents[j] for j in columns],
        scores=similarity[rows, columns].tolist(),
        top=1.0,
    )


def is_score(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def layout(
    path: str | Path, names: Sequence[str] | None, first: Sequence[str]
) -> tuple[tuple[int, int, int], bool, float | None]:
    """(columns of score and sentences, whether the first row is a header, top of the scale where the file is known);
    UserError where neither names nor the first row say."""
    for row, heading in ((names, False), (first, True)):
        found = [plain(name) for name in row or ()]
        score = [k for k, name in enumerate(found) if name in LABELS]
        score.sort(key=lambda k: "score" not in found[k] and "similarity" not in found[k])  # before labels of classes
        pair = next((pair for pair in PAIRS if all(found.count(name) == 1 for name in pair)), None)
        if score and pair is not None and all(found[k] not in pair for k in score[:1]):
            top = STSB_TOP if found[score[0]] == "relatednessscore" else None
            return (score[0], found.index(pair[0]), found.index(pair[1])), heading, top
    if names is None:
        if len(first) == 3:
            word = first[0].lower()
            letters = any(c.isalpha() for c in word) and not any(c.isdigit() for c in word)
            return (0, 1, 2), letters and word not in NO_SCORES, None
        if len(first) == 5 and first[4].upper() in SICK_LABELS:
            return SICK, False, STSB_TOP
        if len(first) >= 7 and (is_score(first[4]) or not first[4]):
            return STSB, False, STSB_TOP
        raise UserError(f"{path}, line 1: {GIVE}")
    raise UserError(f"{path} has the columns {', '.join(names)}; name them score, sentence1 and sentence2")


def rows_of(path: str | Path) -> tuple[list[tuple[int, tuple[str, ...]]], Sequence[str] | None]:
    """Rows with their line numbers, and names of the columns. Tab-separated rows may differ in width."""
    kind = format_of(path)
    if kind == "csv":  # STS-B's own files are tab-separated
        _, line = next(read_lines(path), (1, ""))
        kind = "tsv" if line.count("\t") >= 2 else kind
    if kind not in ("txt", "tsv"):
        table = read_table(path, kind)
        return table.rows, table.names
    rows = [
        (number, tuple(cell.strip() for cell in line.split("\t"))) for number, line in read_lines(path) if line.strip()
    ]
    if not rows:
        raise UserError(f"{path} has no usable line; {GIVE}")
    return rows, None


def read_eval_file(path: str | Path) -> ScoredPairs:
    """Read pairs with scores: score, sentence1, sentence2 a line, separated by tabs; STS-B's own files and SICK's;
    or any format of pycse.training.files whose columns have such names.

    Pairs without a score are skipped and counted. Without known names, a first line whose score has letters and no
    digit is a header.
    """
    rows, names = rows_of(path)
    columns, heading, known_top = layout(path, names, rows[0][1])
    width, skipped = max(columns) + 1, 0
    found: list[tuple[float, str, str]] = []
    exact = columns == (0, 1, 2) and names is None  # a tab inside a text
    for number, row in rows[heading:]:
        if len(row) < width or (exact and len(row) != width):
            raise UserError(f"{path}, line {number}: {GIVE}")
        score, first, second = (row[k] for k in columns)
        if not score:
            skipped += 1
            continue
        if not first or not second:
            raise UserError(f"{path}, line {number}: a sentence is empty; {GIVE}")
        if not is_score(score):
            raise UserError(f"{path}, line {number}: the score {score!r} is no number; put a number, or leave it empty")
        found.append((float(score), first, second))
    if len({score for score, _, _ in found}) < 2:
        raise UserError(f"{path} has no two different scores in its {len(found)} pairs, so nothing to rank")
    if all(first == second for _, first, second in found):
        raise UserError(f"{path}: both texts of every pair are the same, so all are equally similar: nothing to rank")
    scores, firsts, seconds = (list(column) for column in zip(*found, strict=True))
    top = known_top if known_top is not None else max(scores)
    return ScoredPairs(user_path(path).stem, firsts, seconds, scores, top, skipped)


def evaluation_sets(paths: Sequence[str], lee: bool = True) -> list[ScoredPairs]:
    """The Lee documents, unless they are unwanted, and every file, under names that differ."""
    if not lee and not paths:
        raise UserError("--no-lee leaves nothing to evaluate on; give --eval-file, or leave it out")
    sets = [lee_pairs()] if lee else []
    for path in paths:
        pairs = read_eval_file(path)
        taken = {known.name for known in sets}
        name, count = pairs.name, 1
        while pairs.name in taken:
            count += 1
            pairs.name = f"{name}-{count}"
        sets.append(pairs)
    return sets
