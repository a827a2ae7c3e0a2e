"""The README.md of a model that pycse trained: how it was made, how to load it, how good it is, whom to cite.

Written by us, since the card of sentence-transformers' trainer quotes the training text and knows no recipe. Text is
quoted only where --card-text asks for it, and of local paths there is the last name alone: a model is handed on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycse.sparse.linear import SparseLinear
from pycse.training.choices import BUNDLED
from pycse.training.options import option_of
from pycse.training.recipes import RECIPES
from pycse.training.resume import installed
from pycse.training.run import Run
from pycse.training.settings import Settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

QUOTED = 3  # rows of text
PLACE = "path/to/this/folder"
BASE = "sentence-transformers/all-MiniLM-L6-v2"  # of the encoder of the training extras
UNTOLD = ("out", "cache_teachers", "prunes", "card_text", "device")  # settings that say nothing about the model
SESSION = {one.name for one in fields(Settings) if (known := option_of(one)) is not None and known.session}
PATHS = {one.name for one in fields(Settings) if (known := option_of(one)) is not None and known.path}


def card(run: Run, encoder: SentenceTransformer, dtype: str) -> str:
    """The Markdown text.

    Args:
        dtype: of the saved weights, by its name.
    """
    settings = run.settings
    what = "A static table of tokens" if run.static else "A sentence encoder"
    how = f"trained with [pycse](https://pypi.org/project/pycse-kernels/) {installed('pycse-kernels')}"
    if settings.prunes:
        how = how.replace("trained", "pruned")
    width = encoder.get_embedding_dimension()
    parts = [
        front_matter(run),
        f"# {title(run)}",
        f"{what}, {how}, recipe {settings.recipe} ({RECIPES[settings.recipe].source}). It makes embeddings of {width} "
        f"numbers, weights in {dtype}.",
        "## Load\n\n" + "\n".join(load_lines(run, encoder)),
        "## Scores\n\n" + "\n".join(score_lines(run)),
        "## Training\n\n" + "\n".join(training_lines(run)),
        "## Cite\n\n```bibtex\n" + "\n".join(cited(run)) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(run: Run) -> str:
    start = shown(run.model).split(" (")[0]
    return f"{start}, {run.settings.recipe}" if not run.static else f"Static embeddings: {start}"


def front_matter(run: Run) -> str:
    """What Hugging Face reads."""
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "pycse", run.settings.recipe]
    if run.static:
        tags.append("static-embeddings")
    lines = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    if base := base_model(run):
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---"])


def base_model(run: Run) -> str | None:
    """The Hugging Face id of the encoder that the run began with; None for a folder."""
    name = run.settings.init or run.settings.model or BUNDLED
    if name == BUNDLED:
        return BASE
    return name if is_id(name) else None


def is_id(name: str) -> bool:
    return name.count("/") < 2 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def load_lines(run: Run, encoder: SentenceTransformer) -> Iterator[str]:
    """The right way to load it, which for a pruned encoder is ours."""
    backbone: Any = getattr(encoder[0], "auto_model", None)
    masked = any(isinstance(module, SparseLinear) for module in encoder.modules())
    shrunk = str(getattr(getattr(backbone, "config", None), "model_type", "")).startswith("pycse_shrunk_")
    lines = ["from sentence_transformers import SentenceTransformer", "", f'model = SentenceTransformer("{PLACE}")']
    if masked or shrunk:
        lines = ["import pycse.sparse", "", f'model = pycse.sparse.load("{PLACE}")']
    elif run.settings.trust_remote_code:
        lines[-1] = f'model = SentenceTransformer("{PLACE}", trust_remote_code=True)  # if you trust the code here'
    elif run.static and len(run.settings.lengths) > 1:
        lines[-1] += f"  # or with truncate_dim={min(run.settings.lengths)}; trained at {lengths(run)}"
    lines.append('embeddings = model.encode(["A sentence.", "Another one."])')
    yield from ("```python", *lines, "```")
    if masked:
        yield "\nWithout pycse, `SentenceTransformer` loads the same weights, with zeros where they were removed."
    elif shrunk:
        yield "\n`SentenceTransformer` alone does not know layers of these sizes."


def lengths(run: Run) -> str:
    return ", ".join(map(str, run.settings.lengths))


def score_lines(run: Run) -> Iterator[str]:
    """A table of every set, before and after."""
    from pycse.training.report import score_columns

    columns = {heading: scores for heading, scores in score_columns(run).items() if scores}
    if not columns:
        yield "Not evaluated."
        return
    yield f"| set | measure | {' | '.join(columns)} |"
    yield f"|---|---|{'---|' * len(columns)}"
    last = next(reversed(columns.values()))
    for name, measures in last.items():
        for measure in measures:
            values = [scores.get(name, {}).get(measure) for scores in columns.values()]
            numbers = [f"{value:.4f}" if isinstance(value, (int, float)) else "" for value in values]
            yield f"| {escaped(name)} | {measure} | {' | '.join(numbers)} |"


def training_lines(run: Run) -> Iterator[str]:
    """What it was trained on, and every setting that has a value."""
    text = run.text
    yield f"- start: {escaped(shown(run.model))}, {run.shape}"
    yield f"- text: {len(text.rows):,} {text.unit}"
    for teacher in run.teachers:
        yield f"- teacher: {escaped(shown(str(teacher['name'])))}, width {teacher['width']}"
    if run.pruned:
        yield f"- removed: {run.pruned.report.summary()}"
    if run.loss:
        yield f"- steps: {run.steps}" + (f", {run.processes} processes" if run.processes > 1 else "")
    if run.settings.card_text:
        yield "\nRows of the text:\n"
        for row in text.rows[:QUOTED]:
            yield f"- {' | '.join(escaped(' '.join(column.split())) for column in row)}"
    yield "\n| setting | value |\n|---|---|"
    for name, value in run.settings.as_dict().items():
        if name not in UNTOLD and name not in SESSION and value not in (None, [], (), "", False):
            yield f"| {name} | {escaped(shown(value) if name in PATHS else plain(value))} |"


def shown(name: Any) -> str:
    """A model or a file as it is told to others: of a local path the last name."""
    if isinstance(name, (list, tuple)):
        return ", ".join(map(shown, name))
    path = str(name).split(" (")[0]
    return str(name) if is_id(path) else str(name).replace(path, Path(path).name, 1)


def plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def cited(run: Run) -> Iterator[str]:
    """Of the papers behind the recipe."""
    from pycse.sentence_transformers import citations

    known = {
        "simcse": citations.SIMCSE,
        "focal": citations.FOCAL,
        "distillcse": citations.DISTILLCSE,
        "sparsecse": citations.SPARSECSE,
    }
    recipe = run.settings.recipe
    papers = [known[recipe]] if recipe in known else []
    if run.pruned and recipe != "sparsecse":
        papers.append(citations.SPARSECSE)
    if run.static and len(run.settings.lengths) > 1:
        papers.append(citations.MATRYOSHKA)
    yield from (paper.strip() for paper in papers)
