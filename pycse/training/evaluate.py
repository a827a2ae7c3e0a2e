"""How good an encoder is: Spearman against human similarity, alignment and uniformity.

    Spearman     rank correlation of cosine similarity with the human scores       (higher is better)
    alignment    mean ||f(x) - f(x+)||^2 over pairs that people judge similar        (lower is better)
    uniformity   log mean_{i<j} exp(-2 ||f(x_i) - f(x_j)||^2) over the distinct texts  (lower is better)

f is the embedding scaled to length 1 (Wang & Isola, ICML 2020). Similar means a score above 0.8 of the scale's top,
which for STS scores of 0 to 5 is the usual "above 4" (Gao et al., EMNLP 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pycse.hypersphere import alignment, uniformity
from pycse.training.data import read_lines
from pycse.training.errors import UserError

SIMILAR = 0.8  # of the scale's top
MEASURES = ("spearman", "alignment", "uniformity")
Scores = dict[str, dict[str, float]]  # set -> measure -> value; alignment is absent where no pair is similar


@dataclass
class ScoredPairs:
    """Pairs of texts with human similarity scores; `top` is the top of the scale of the scores."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]
    top: float


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


def read_eval_file(path: str | Path) -> ScoredPairs:
    """Read score, sentence1, sentence2 a line, tab-separated. A first line whose score has no digit is a header."""
    rows: list[tuple[float, str, str]] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 3 or not all(columns):
            raise UserError(f"{path}, line {number}: give score, sentence1 and sentence2, separated by tabs")
        if number == 1 and not any(character.isdigit() for character in columns[0]):
            continue
        try:
            score = float(columns[0])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise UserError(f"{path}, line {number}: the score {columns[0]!r} is no number; put a number first")
        rows.append((score, columns[1], columns[2]))
    if len({score for score, _, _ in rows}) < 2:
        raise UserError(f"{path} has no two different scores in its {len(rows)} pairs, so nothing to rank")
    scores, first, second = (list(column) for column in zip(*rows, strict=True))
    return ScoredPairs(Path(path).stem, first, second, scores, top=max(scores))


def evaluation_sets(paths: tuple[str, ...]) -> list[ScoredPairs]:
    """The Lee documents and every file, under names that differ."""
    sets = [lee_pairs()]
    for path in paths:
        pairs = read_eval_file(path)
        taken = {known.name for known in sets}
        name, count = pairs.name, 1
        while pairs.name in taken:
            count += 1
            pairs.name = f"{name}-{count}"
        sets.append(pairs)
    return sets


def evaluators(sets: list[ScoredPairs], batch_size: int = 64, max_length: int | None = None) -> list:
    """One sentence-transformers evaluator a set.

    Args:
        max_length: tokens that texts are cut at, so that a run trained on short texts is judged on whole ones;
            None leaves the encoder's own limit.
    """
    import numpy as np
    import torch
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    class PairEvaluator(EmbeddingSimilarityEvaluator):
        """Adds alignment and uniformity, and embeds each distinct text once (Lee: 50 documents, not 2450)."""

        def __init__(self, pairs: ScoredPairs):
            super().__init__(
                pairs.first,
                pairs.second,
                pairs.scores,
                batch_size=batch_size,
                main_similarity="cosine",
                name=pairs.name,
                write_csv=False,
            )
            self.index = {text: i for i, text in enumerate(dict.fromkeys(pairs.first + pairs.second))}
            self.similar = np.asarray(pairs.scores) > SIMILAR * pairs.top

        def embed_inputs(self, model, sentences, **options):
            return self.embeddings[[self.index[sentence] for sentence in sentences]]

        def __call__(self, model, output_path=None, epoch=-1, steps=-1) -> dict[str, float]:
            own_length = model.max_seq_length
            if max_length is not None:  # a bag of tokens has no limit, and none can be set
                model.max_seq_length = max_length
            # A device, for the trainer would share the texts out to other processes, whose encoders have not this
            # length: rank 0 reads all, as one process does.
            self.embeddings = super().embed_inputs(model, list(self.index), device=str(model.device))
            if max_length is not None:
                model.max_seq_length = own_length
            metrics = super().__call__(model, output_path, epoch, steps)
            z = torch.from_numpy(self.embeddings).double()
            if len(z) > 1:
                metrics[f"{self.name}_uniformity"] = uniformity(z).item()
            if self.similar.any():
                first, second = (
                    [self.index[text] for text, similar in zip(texts, self.similar, strict=True) if similar]
                    for texts in (self.sentences1, self.sentences2)
                )
                metrics[f"{self.name}_alignment"] = alignment(z[first], z[second]).item()
            return metrics

    return [PairEvaluator(pairs) for pairs in sets]


def by_set(metrics: dict[str, float], names: list[str], prefix: str = "") -> Scores:
    """Flat metrics of the evaluators -> set -> measure -> value."""
    keys = {"spearman": "spearman_cosine", "alignment": "alignment", "uniformity": "uniformity"}
    return {
        name: {
            measure: metrics[f"{prefix}{name}_{key}"]
            for measure, key in keys.items()
            if f"{prefix}{name}_{key}" in metrics
        }
        for name in names
    }


def evaluate(encoder, sets: list[ScoredPairs], batch_size: int = 64) -> Scores:
    """Scores of an encoder on every set."""
    metrics: dict[str, float] = {}
    for evaluator in evaluators(sets, batch_size):
        metrics |= evaluator(encoder)
    return by_set(metrics, [pairs.name for pairs in sets])
