"""One run of `pycse train --static`: check, make the table, tokenise, train, save, stand it beside an encoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pycse.training import ranks
from pycse.training.checkpoints import guarded
from pycse.training.choices import BUNDLED
from pycse.training.encoder import check_case, load_encoder
from pycse.training.errors import UserError
from pycse.training.evaluate import evaluate
from pycse.training.folder import of_disk
from pycse.training.names import bundled_model
from pycse.training.prepare import load_all_teachers, model_name, prepare, step_count
from pycse.training.pruning import encoding, speeds
from pycse.training.report import end, recorded, text_table
from pycse.training.resume import check_same_data, run_folder
from pycse.training.run import Run, Static
from pycse.training.saving import save_model
from pycse.training.saving import write as write_model
from pycse.training.settings import Settings
from pycse.training.static.fit import fit
from pycse.training.static.loss import check_loss
from pycse.training.static.memory import keep_freed_memory
from pycse.training.static.table import bag, start
from pycse.training.static.tokens import KeptTeacher, tokenise
from pycse.training.teachers import described

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TIMED, TIMED_STATIC = 128, 4096  # sentences of the text that speeds are measured on


def train_static(settings: Settings, console) -> tuple[Run, Path]:
    """Train a static table as the settings describe; writes the model to OUT/model.

    Returns:
        The Run, and the folder that it wrote to.

    Raises:
        UserError: for input that cannot be used; nothing has been written then.
    """
    started = time.perf_counter()
    with ranks.together():
        if ranks.size() > 1:
            raise UserError(f"--static trains in one process, not {ranks.size()}; start it without a launcher")
    out, sets, text, source, _ = prepare(settings, "static")
    check_same_data(settings, text, sets, console)

    from transformers import set_seed

    set_seed(settings.seed)
    shown = model_name(settings)
    begun = start(settings, source, shown, settings.device)
    model = begun.model
    if settings.positives == "switch-case":
        check_case(model, text.rows)
    check_loss(settings, model.device)
    teachers = load_all_teachers(settings, model, source, shown)
    keep_freed_memory()

    table = bag(model).weight
    run = Run(
        settings=settings,
        text=text,
        model=begun.words,
        layers=[],
        layers_before=0,
        parameters=table.numel(),
        device=str(model.device),
        steps=step_count(settings, text),
        static=Static(tokens=table.shape[0], width=table.shape[1], start=begun.words),
    )
    console.print(text_table(text, sets))
    with run_folder(settings, out, text, sets) as folder:
        before = time.perf_counter()
        with of_disk(f"in {folder.path}"):
            tokens = tokenise(text, begun.tokenizer, settings.max_length, folder.work)
        run.seconds["tokenise"] = time.perf_counter() - before
        sentences = tokens.sentences if teachers else []
        kept = [
            KeptTeacher(one, sentences, tokens.index[:, 0], folder.work / f"teacher-{k}")
            for k, one in enumerate(teachers)
        ]
        with recorded(run, folder.path):
            fit(run, model, tokens, kept, sets, folder.path, console)
        run.teachers = described(teachers)
        model.eval()
        name, encoder = beside(begun.encoder, shown, settings.device)
        guarded(lambda: stand(run, model, name, encoder, sets, folder.work), console, "sizes could not be measured")
        end(run, folder, lambda stage: save_model(model, stage, settings, run), started)
    return run, folder.path


def beside(encoder: SentenceTransformer | None, shown: str, device: str) -> tuple[str, SentenceTransformer]:
    """The encoder that a table stands beside: the one that it has its tokens from, else the bundled one."""
    if encoder is not None:
        return shown.split(" (")[0], encoder
    return BUNDLED, load_encoder(bundled_model(), device)


def stand(run: Run, model: SentenceTransformer, name: str, encoder: SentenceTransformer, sets, scratch: Path) -> None:
    """Scores, size and speed of the table and of the encoder."""
    assert run.static is not None
    run.static.beside = (name, evaluate(encoder, sets))
    sentences = [row[0] for row in run.text.rows[:TIMED_STATIC]]
    few = sentences[:TIMED]
    for key, one, call, count in (
        ("static", model, lambda: model.encode(sentences, batch_size=512, show_progress_bar=False), len(sentences)),
        ("encoder", encoder, encoding(encoder, few), len(few)),
    ):
        folder = scratch / f"size-{key}"
        write_model(one, folder)
        weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        run.static.size[key] = {"megabytes": weights / 1e6, "sentences_a_second": speeds({key: call}, count)[key]}
