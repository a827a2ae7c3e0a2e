"""The seven STS tasks in the layout of SentEval's data folder, scored as SimCSE does: Spearman of all pairs of a task.

    STS/STS12-en-test/STS.input.SUBSET.txt   sentence <tab> sentence     (STS12 to STS16)
    STS/STS12-en-test/STS.gs.SUBSET.txt      a score a line, empty where nobody has scored the pair
    STS/STSBenchmark/sts-test.csv            tab-separated, score and sentences in columns 5 to 7
    SICK/SICK_test_annotated.txt             number, sentence, sentence, score, entailment; perhaps a header

The "all" setting joins the subsets of a task before it ranks (Gao, Yao & Chen, EMNLP 2021, appendix B).
"""

from __future__ import annotations

from pathlib import Path

from pycse.training.errors import UserError
from pycse.training.eval_sets import STSB_TOP, ScoredPairs, is_score, read_eval_file
from pycse.training.files import read_lines, user_path

SUBSETS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),  # SMT's sentences may not be passed on
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
FILES = {"STS-B": "STS/STSBenchmark/sts-test.csv", "SICK-R": "SICK/SICK_test_annotated.txt"}
COUNTS = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186, "STS-B": 1379, "SICK-R": 4927}
TASKS = tuple(COUNTS)
INSIDE = ("", "downstream", "data/downstream")  # of what people call SentEval's folder
# Spearman of cosines x 100, TASKS and their mean: unsupervised, BERT-base, as printed.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "SimCSE (Gao et al., 2021)": (68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23, 76.25),
    "Focal-InfoNCE (Hou & Li, 2023)": (68.58, 83.29, 75.20, 82.54, 79.62, 79.31, 72.72, 77.32),
    "DistillCSE (Xu et al., 2023)": (72.32, 84.88, 77.12, 83.92, 81.05, 80.75, 73.21, 79.04),
}


def senteval_sets(folder: str | Path) -> list[ScoredPairs]:
    """The tasks that are there; UserError where there is none, or a task lacks a file.

    The count of a task may differ from COUNTS, which unlike does not compare with published scores: see
    :func:`differences`.
    """
    base = user_path(folder)
    if not base.is_dir():
        raise UserError(f"--senteval {folder}: no such folder; give SentEval's data/downstream")
    for inside in INSIDE:
        root = base / inside
        sets = [one for task in TASKS if (one := _task(root, task)) is not None]
        if sets:
            return sets
    raise UserError(
        f"--senteval {folder} has neither STS/ nor SICK/ with tasks inside; give SentEval's data/downstream"
    )


def differences(sets: list[ScoredPairs]) -> list[str]:
    """What keeps the scores from being those that papers print, in words."""
    there = {one.name: len(one.scores) for one in sets}
    return [
        f"{task} is not there" if task not in there else f"{task} has {there[task]} scored pairs, not {count}"
        for task, count in COUNTS.items()
        if there.get(task) != count
    ]


def _task(root: Path, task: str) -> ScoredPairs | None:
    if task in FILES:
        path = root / FILES[task]
        if not path.is_file():
            return None
        pairs = read_eval_file(path)
        pairs.name, pairs.top = task, STSB_TOP
        return pairs
    folder = root / "STS" / f"{task}-en-test"
    if not folder.is_dir():
        return None
    joined = ScoredPairs(task, [], [], [], STSB_TOP, parts={})
    assert joined.parts is not None
    for subset in SUBSETS[task]:
        begin = len(joined.scores)
        _subset(joined, folder / f"STS.input.{subset}.txt", folder / f"STS.gs.{subset}.txt")
        joined.parts[subset] = (begin, len(joined.scores))
    if len(set(joined.scores)) < 2:
        raise UserError(f"{folder} has no two different scores in its {len(joined.scores)} pairs, so nothing to rank")
    return joined


def _subset(joined: ScoredPairs, texts: Path, gold: Path) -> None:
    """Add the scored pairs of two files that go together line by line."""
    pairs, scores = list(read_lines(texts)), list(read_lines(gold))
    if len(pairs) != len(scores):
        raise UserError(f"{texts} has {len(pairs)} lines and {gold.name} {len(scores)}; give files that go together")
    for (number, line), (_, score) in zip(pairs, scores):
        score = score.strip()
        if not score:
            joined.skipped += 1
            continue
        if not is_score(score):
            raise UserError(f"{gold}, line {number}: the score {score!r} is no number; put one, or leave it empty")
        sentences = [cell.strip() for cell in line.split("\t")[:2]]
        if len(sentences) < 2 or not all(sentences):
            raise UserError(f"{texts}, line {number}: give two sentences with a tab between them")
        joined.first.append(sentences[0])
        joined.second.append(sentences[1])
        joined.scores.append(float(score))
