"""One training run: check everything, evaluate, train with sentence-transformers, evaluate, save."""

from __future__ import annotations

import copy
import time
from pathlib import Path

from pycse.training import ranks
from pycse.training.encoder import check_case, check_for_training, keep_layers, load_encoder, loading_options
from pycse.training.estimate import estimate
from pycse.training.fit import fit
from pycse.training.heads import add_head, remove_head
from pycse.training.loss import build_loss, check_loss
from pycse.training.pooling import set_pooling
from pycse.training.prepare import keep_prompts, load_all_teachers, model_name, prepare, step_count, take_prompt
from pycse.training.pruning import check_prunable, remove, tune, tuning_steps
from pycse.training.recipes import RECIPES
from pycse.training.report import end, recorded, text_table
from pycse.training.resume import check_same_data, run_folder
from pycse.training.run import Run
from pycse.training.saving import check_saves, save_model
from pycse.training.settings import Settings
from pycse.training.static.run import train_static
from pycse.training.teachers import described


def train(settings: Settings, console) -> tuple[Run, Path] | None:
    """Run the training that the settings describe; writes the model to OUT/model. Of several processes each calls it,
    and rank 0 writes.

    Args:
        settings: the run.
        console: a rich Console (markup=False) for the count of the text and the progress bar.

    Returns:
        The Run, and the folder that it wrote to; None after --dry-run.

    Raises:
        UserError: for input that cannot be used; nothing has been written then.
    """
    if settings.static is not None:
        return train_static(settings, console)
    started = time.perf_counter()
    with ranks.together():
        out, sets, text, model, keep = prepare(settings)
        check_same_data(settings, text, sets, console)
        prunes = RECIPES[settings.recipe].prunes

        from transformers import set_seed

        set_seed(settings.seed)
        encoder = load_encoder(model, ranks.device(settings.device), **loading_options(settings, training=True))
        take_prompt(settings, encoder)
        layers_before = keep_layers(encoder, keep)
        set_pooling(encoder, settings.pooling)
        check_for_training(encoder, text.by_dropout, settings.max_length)
        if settings.positives == "switch-case":
            check_case(encoder, text.rows)
        check_saves(encoder, settings, keep)
        if prunes:
            check_prunable(settings, encoder, text)
        shown = model_name(settings)
        check_loss(settings, encoder.device)
        teachers = load_all_teachers(settings, encoder, model, f"{shown}, uncut")
        parameters = sum(parameter.numel() for parameter in encoder.parameters())
        add_head(encoder, settings.head)
        loss = build_loss(settings, encoder, teachers)
    ranks.join(encoder.device)

    run = Run(
        settings=settings,
        text=text,
        model=shown,
        layers=keep if keep is not None else list(range(layers_before)),
        layers_before=layers_before,
        parameters=parameters,
        device=str(encoder.device),
        steps=step_count(settings, text),
        processes=ranks.size(),
        more_to_come=prunes,
    )
    console.print(text_table(text, sets))
    own_length = encoder.max_seq_length
    if settings.dry_run:
        more = tuning_steps(settings, run.steps) if prunes else 0
        console.print(estimate(run, encoder, loss, sets, run.steps + more))
        return None
    with run_folder(settings, out, text, sets) as folder:
        with recorded(run, folder.path):
            fit(run, encoder, loss, sets, folder.path, console)
            remove_head(encoder)
            if prunes:
                encoder.max_seq_length = own_length
                later = run.another(tuning_steps(settings, run.steps))
                dense = copy.deepcopy(encoder)
                report = remove(settings, encoder, text)
                run.pruned = tune(later, encoder, dense, report, run.after, loss, sets, folder, console)
                run.follow(later)
                run.after = run.pruned.final
        run.teachers = described(teachers)
        encoder.max_seq_length = own_length
        keep_prompts(encoder, settings)
        with ranks.together():
            if ranks.first():
                end(run, folder, lambda stage: save_model(encoder, stage, settings, run), started)
    return run, folder.path
