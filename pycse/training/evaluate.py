"""How good an encoder is: Spearman against human similarity, alignment and uniformity.

    Spearman     rank correlation of cosine similarity with the human scores       (higher is better)
    alignment    mean ||f(x) - f(x+)||^2 over pairs that people judge similar        (lower is better)
    uniformity   log mean_{i<j} exp(-2 ||f(x_i) - f(x_j)||^2) over the distinct texts  (lower is better)

f is the embedding scaled to length 1 (Wang & Isola, ICML 2020). Similar means a score above 0.8 of the scale's top,
which for STS scores of 0 to 5 is the usual "above 4" (Gao et al., EMNLP 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pycse.hypersphere import alignment, uniformity
from pycse.training.errors import UserError
from pycse.training.eval_sets import ScoredPairs

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SIMILAR = 0.8  # of the scale's top
MEASURES = ("spearman", "alignment", "uniformity")
Scores = dict[str, dict[str, float]]  # set -> measure -> value; alignment is absent where no pair is similar
Prompts = tuple[str | None, str | None]  # before the first and the second text of a pair
NO_PROMPTS: Prompts = (None, None)
Histogram = dict[str, list[int]]  # "similar" and "others" -> pairs in each bin
BINS = 40
BATCH_SIZE = 64  # texts embedded at a time
# Of a cosine: what is behind them is the rounding of float32 embeddings, and would rank equal texts by chance.
DIGITS = 6
NOISE = 1e-5  # all cosines in so short an interval are one


class Embedded:
    """Every distinct text of some sets, embedded once.

    Args:
        max_length: tokens that texts are cut at, so that a run trained on short texts is judged on whole ones; None
            leaves the encoder's own limit.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        sets: Iterable[ScoredPairs],
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        prompts: Prompts = NO_PROMPTS,
    ) -> None:
        self.prompts = prompts
        self.index: dict[tuple[str | None, str], int] = {}
        for prompt, text in (pair for one in sets for pair in self.texts(one)):
            self.index.setdefault((prompt, text), len(self.index))
        own_length = encoder.max_seq_length
        if max_length is not None:  # a bag of tokens has no limit, and none can be set
            encoder.max_seq_length = max_length
        try:
            self.z = self._embed(encoder, batch_size)
        finally:
            if max_length is not None:
                encoder.max_seq_length = own_length

    def texts(self, pairs: ScoredPairs) -> Iterable[tuple[str | None, str]]:
        for prompt, column in zip(self.prompts, (pairs.first, pairs.second)):
            yield from ((prompt, text) for text in column)

    def _embed(self, encoder: SentenceTransformer, batch_size: int) -> Any:
        import numpy as np

        found: Any = None
        for prompt in dict.fromkeys(self.prompts):
            places = [place for (own, _), place in self.index.items() if own == prompt]
            if not places:
                continue
            # A device, for the trainer would share the texts out to other processes, whose encoders have not this
            # length: rank 0 reads all, as one process does.
            z = encoder.encode(
                [text for own, text in self.index if own == prompt],
                batch_size=batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
                prompt=prompt,
                device=str(encoder.device),
            )
            if found is None:
                found = np.empty((len(self.index), z.shape[1]), dtype=np.float32)
            found[places] = z
        return found

    def places(self, pairs: ScoredPairs) -> tuple[Any, Any, Any]:
        """Embeddings of the set's own distinct texts, in float64, and which of them each pair has."""
        import torch

        rows = torch.tensor([self.index[text] for text in self.texts(pairs)], dtype=torch.int64, device="cpu")
        own, place = torch.unique(rows, return_inverse=True)
        return torch.from_numpy(self.z[own.numpy()]).double(), *place.split(len(pairs.first))

    def measures(self, pairs: ScoredPairs) -> dict[str, float]:
        """Measure -> value; the Spearman is nan where the encoder ranks nothing."""
        import torch

        z, first, second = self.places(pairs)
        found = {"spearman": spearman(cosines_of(z, first, second), pairs.scores)}
        similar = torch.tensor(pairs.scores, dtype=torch.float64, device="cpu") > SIMILAR * pairs.top
        if similar.any():
            found["alignment"] = alignment(z[first[similar]], z[second[similar]]).item()
        if len(z) > 1:
            found["uniformity"] = uniformity(z).item()
        return found

    def histogram(self, pairs: ScoredPairs) -> Histogram:
        """How many pairs have a cosine in each of BINS equal parts of [-1, 1]: of pairs that people judge similar, and
        of the others."""
        import torch

        z, first, second = self.places(pairs)
        cosines = cosines_of(z, first, second)
        similar = torch.tensor(pairs.scores, dtype=torch.float64, device="cpu") > SIMILAR * pairs.top
        return {
            name: torch.histc(cosines[those], BINS, -1, 1).int().tolist()
            for name, those in (("similar", similar), ("others", ~similar))
        }

    def part(self, pairs: ScoredPairs, name: str) -> float:
        """Spearman of a part of the set."""
        assert pairs.parts is not None
        i, j = pairs.parts[name]
        part = ScoredPairs(name, pairs.first[i:j], pairs.second[i:j], pairs.scores[i:j], pairs.top)
        return self.measures(part)["spearman"]


def cosines_of(z: Any, first: Any, second: Any) -> Any:
    """Of rows of z."""
    import torch

    unit = torch.nn.functional.normalize(z)
    return (unit[first] * unit[second]).sum(1)


def spearman(cosines: Any, scores: Sequence[float]) -> float:
    """Rank correlation; nan where the cosines are no numbers, or all the same but for rounding."""
    from scipy.stats import spearmanr

    if not cosines.isfinite().all() or (cosines.max() - cosines.min()).item() < NOISE:
        return math.nan
    return float(spearmanr(cosines.round(decimals=DIGITS).numpy(), scores)[0])


def metric(name: str, measure: str, prefix: str = "") -> str:
    """What a set's measure is called among the trainer's metrics.

    The trainer puts eval_ before names that do not begin so: with a colon behind a word of ours, no file's name does.
    """
    return f"{prefix}set:{name}_{measure}"


def evaluator(
    sets: list[ScoredPairs],
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    prompts: Prompts = NO_PROMPTS,
) -> Any:
    """The sets as an evaluator of sentence-transformers' trainer; arguments as of :class:`Embedded`."""
    from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

    class PairsEvaluator(SentenceEvaluator):
        def __call__(self, model, output_path=None, epoch=-1, steps=-1) -> dict[str, float]:
            embedded = Embedded(model, sets, batch_size, max_length, prompts)
            self.histogram = embedded.histogram(sets[0])
            found = {pairs.name: embedded.measures(pairs) for pairs in sets}
            return {metric(name, measure): value for name, one in found.items() for measure, value in one.items()}

    judge = PairsEvaluator()
    judge.primary_metric = metric(sets[0].name, "spearman")
    return judge


def by_set(metrics: dict[str, float], names: list[str], prefix: str = "") -> Scores:
    """Flat metrics of the evaluator -> set -> measure -> value."""
    return {
        name: {
            measure: metrics[metric(name, measure, prefix)]
            for measure in MEASURES
            if metric(name, measure, prefix) in metrics
        }
        for name in names
    }


def evaluate(
    encoder: SentenceTransformer,
    sets: list[ScoredPairs],
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    prompts: Prompts = NO_PROMPTS,
) -> Scores:
    """Scores of an encoder on every set; arguments as of :class:`Embedded`."""
    embedded = Embedded(encoder, sets, batch_size, max_length, prompts)
    return {pairs.name: embedded.measures(pairs) for pairs in sets}


def no_ranking(scores: Scores) -> str | None:
    """Why sets have no Spearman, in words; None where all have one."""
    without = {name: one for name, one in scores.items() if math.isnan(one["spearman"])}
    if not without:
        return None
    broken = [name for name, one in without.items() if math.isnan(one.get("uniformity", 0.0))]
    if broken:
        return f"embeddings of {', '.join(broken)} are not finite numbers, so there is no Spearman"
    return f"all pairs of {', '.join(without)} are equally similar, so there is no Spearman: every text has one place"


def check_ranking(model: str, scores: Scores) -> None:
    """Raise UserError where an encoder ranks nothing."""
    if (why := no_ranking(scores)) is not None:
        raise UserError(f"{model}: {why}; give a model that is trained")
