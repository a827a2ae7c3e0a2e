"""The `pycse` command. Everything heavy is imported inside the commands, so that help is quick."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from pycse.problem import DIVERGENCES, SHUFFLES
from pycse.training import ranks
from pycse.training.errors import UserError, require_extras
from pycse.training.recipes import PRUNING, RECIPES
from pycse.training.settings import (
    BATCH_SIZE,
    BUNDLED,
    DEFAULT_LAYERS,
    DEFAULT_STEPS,
    DEVICES,
    EVALUATIONS,
    GRANULARITIES,
    MAX_LENGTH,
    MEANS,
    SCOPES,
    SHORTEST,
    STATIC_BATCH_SIZE,
    STATIC_INIT_LR,
    STATIC_LR,
    STATIC_MAX_LENGTH,
    Settings,
)

app = typer.Typer(
    help="Fused contrastive losses for sentence embeddings: train and evaluate encoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DEFAULTS = Settings()
DEVICE_HELP = f"One of {', '.join(DEVICES)}; auto takes a GPU where there is one."
DISTILL = RECIPES["distillcse"].own
PRUNES = " or ".join(name for name, recipe in RECIPES.items() if recipe.prunes)
SPARSITY_HELP = (
    f"Share of the weights, blocks, heads or neurons to remove, of 0 to below 1. Default: {PRUNING['sparsity']}."
)
GRANULARITY_HELP = (
    f"What is removed: one of {', '.join(GRANULARITIES)}, or n:m as in 2:4, which keeps 2 of every 4 weights. "
    f"Default: {PRUNING['granularity']}."
)
SCOPE_HELP = (
    f"One of {', '.join(SCOPES)}: the share of all, or of each layer. Default: layer for neuron and n:m, else global."
)
BLOCK_HELP = f"Side of a block, --granularity block. Default: {PRUNING['block']}."
BALANCE_HELP = f"Share of alignment in the scores; the rest is uniformity's. Default: {PRUNING['balance']}."
MEANS_HELP = (
    f"What scores are divided by, one of {', '.join(MEANS)}: the mean of all parameters, or of each. "
    f"Default: {PRUNING['means']}."
)
SCORE_HELP = f"Batches of text to score parameters on. Default: {PRUNING['score_batches']}."
EVAL_HELP = "Score, sentence1, sentence2 a line, tab-separated; repeatable."


@contextmanager
def reported(command: str) -> Iterator[None]:
    """Turn what the user can put right into one line on stderr and exit code 2. The only place that does.

    Of several processes one says what went wrong, and with which rank, and all exit with its code.
    """

    def line(error: UserError, where: str = "") -> None:
        typer.echo(f"pycse {command}: error: {where}{' '.join(str(error).split())}", err=True)

    try:
        with ranks.one_voice():
            yield
    except ranks.Agreed as error:
        if ranks.first():
            line(error)
        raise typer.Exit(2) from None
    except UserError as error:
        known = error
        if ranks.size() == 1:
            line(error)
            raise typer.Exit(2) from None
        raise typer.Exit(ranks.failed(2, lambda where: line(known, where))) from None
    except ranks.Elsewhere:
        raise typer.Exit(1) from None
    except Exception:
        if ranks.size() == 1:
            raise
        text = traceback.format_exc()
        raise typer.Exit(
            ranks.failed(1, lambda where: typer.echo(f"pycse {command}: {where}{text}", err=True))
        ) from None


def quiet(local: bool) -> None:
    """Keep the libraries silent and, for a model on this disk, off the network. Before their first import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if local:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for message in (".*pin_memory.*", ".*OMP_NUM_THREADS.*", ".*broadcast_buffers.*"):
        warnings.filterwarnings("ignore", message=message)


def finish(write: Callable[[], None]) -> None:
    """The end of a run: rank 0 writes what all have done."""
    with ranks.together():
        if ranks.first():
            write()
    ranks.leave()


def is_local(model: str | None, teachers: tuple[str, ...] = ()) -> bool:
    """Whether the model and the teachers lie on this disk; UserError for a path that holds none."""
    from pycse.training.encoder import resolve_model, resolve_teachers

    return (model is None or resolve_model(model)[1]) and all(local for _, local in resolve_teachers(teachers))


@app.command()
def info() -> None:
    """List the backends, usable or why not, with versions."""
    from pycse.report import info

    typer.echo(str(info()))


@app.command()
def train(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face id or folder of the encoder to start from. Default: the all-MiniLM-L6-v2 that comes "
            "with the training extras."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help=f"Layers to keep, from 0, as in 0,2,4, or all. Default: {DEFAULT_LAYERS} of the default model, all of "
            "another."
        ),
    ] = None,
    static: Annotated[
        int | None,
        typer.Option(
            help="Train a static table of this many features a token instead of an encoder: a text is the mean of its "
            "tokens. --model then gives the tokenizer alone.",
            metavar="WIDTH",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="--static: start from this encoder's embeddings of its tokens, or from another static table. Hugging "
            f"Face id, folder, or {BUNDLED} for the encoder of the training extras. Default: random.",
            metavar="MODEL",
        ),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(
            help="--static: lengths that embeddings shall be good at, as in 1024,512,256. Default: the width, halved "
            f"down to {SHORTEST}.",
        ),
    ] = None,
    train_file: Annotated[
        str | None,
        typer.Option(
            help="Text, one example a line: a sentence, or two or three tab-separated columns (a pair, or a pair and a "
            "hard negative). Default: English Wikipedia sentences that come with the training extras."
        ),
    ] = None,
    positives: Annotated[
        str | None,
        typer.Option(
            help="What a single sentence is pulled to: dropout (itself under another dropout mask, as in SimCSE) or "
            "next (the sentence after it). Default: dropout for --train-file, next for the default text and --static."
        ),
    ] = None,
    eval_file: Annotated[list[str] | None, typer.Option(help=EVAL_HELP, metavar="FILE")] = None,
    out: Annotated[
        str | None,
        typer.Option(help="New or empty folder to write to. Default: runs/RECIPE-DATE-TIME, runs/static-DATE-TIME."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(RECIPES)}. distillcse learns a teacher's similarities beside InfoNCE; focal is "
            "Focal-InfoNCE; simcse is InfoNCE; sparsecse is InfoNCE, then removes parameters and trains the rest. "
            f"Default: {DEFAULTS.recipe}; simcse for --static without --teacher."
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="Hugging Face id or folder of an encoder to learn from, recipe distillcse; repeatable, of any width. "
            "Default: the encoder that --model and --layers cut.",
            metavar="ENCODER",
        ),
    ] = None,
    cache_teachers: Annotated[
        str | None,
        typer.Option(
            help="Folder that keeps the teachers' embeddings, for later epochs and runs; it may be shared.",
            metavar="FOLDER",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the contrastive loss.")] = DEFAULTS.temperature,
    m: Annotated[
        float | None,
        typer.Option(
            help=f"Hardness of Focal-InfoNCE. Default: {RECIPES['focal'].own['m']} for focal; none for distillcse, "
            "whose "
            "contrastive part is then InfoNCE."
        ),
    ] = None,
    distill_weight: Annotated[
        float | None,
        typer.Option(help=f"distillcse: factor of the distillation. Default: {DISTILL['distill_weight']:g}."),
    ] = None,
    student_temperature: Annotated[
        float | None,
        typer.Option(help=f"distillcse: of the student's similarities. Default: {DISTILL['student_temperature']}."),
    ] = None,
    teacher_temperature: Annotated[
        float | None,
        typer.Option(help=f"distillcse: of the teachers' similarities. Default: {DISTILL['teacher_temperature']}."),
    ] = None,
    group_temperature: Annotated[
        float | None,
        typer.Option(help=f"distillcse: of the mass that --group-p counts. Default: {DISTILL['group_temperature']:g}."),
    ] = None,
    group_p: Annotated[
        float | None,
        typer.Option(help="distillcse: probability mass of a group of ranks that is shuffled. Default: 0.1."),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="distillcse: instead of --group-p, ranks in a group.")] = None,
    span: Annotated[
        tuple[int, int] | None,
        typer.Option(help="distillcse: instead of --group-p, the ranks (start, end) of the only group.", metavar="A B"),
    ] = None,
    shuffle: Annotated[
        str | None,
        typer.Option(
            help=f"distillcse: one of {', '.join(SHUFFLES)}. sample shuffles the teachers' probabilities inside each "
            "group; "
            f"expected gives each member the group's mean. Default: {DISTILL['shuffle']}."
        ),
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help=f"distillcse: one of {', '.join(DIVERGENCES)}. Default: {DISTILL['divergence']}.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help=f"{PRUNES}: {SPARSITY_HELP}")] = None,
    granularity: Annotated[str | None, typer.Option(help=f"{PRUNES}: {GRANULARITY_HELP}")] = None,
    scope: Annotated[str | None, typer.Option(help=f"{PRUNES}: {SCOPE_HELP}")] = None,
    block: Annotated[int | None, typer.Option(help=f"{PRUNES}: {BLOCK_HELP}")] = None,
    balance: Annotated[float | None, typer.Option(help=f"{PRUNES}: {BALANCE_HELP}")] = None,
    means: Annotated[str | None, typer.Option(help=f"{PRUNES}: {MEANS_HELP}")] = None,
    score_batches: Annotated[int | None, typer.Option(help=f"{PRUNES}: {SCORE_HELP}")] = None,
    finetune_steps: Annotated[
        int | None, typer.Option(help=f"{PRUNES}: steps after the removal. Default: half of --steps.")
    ] = None,
    hard_negative_weight: Annotated[
        float, typer.Option(help="Added to the logits of a row's own hard negatives.")
    ] = DEFAULTS.hard_negative_weight,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Mean of the loss in both directions.")] = False,
    backend: Annotated[str, typer.Option(help="Backend of the loss; pycse info lists them.")] = DEFAULTS.backend,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"Rows a step; of each process where there are several. Default: {BATCH_SIZE}; {STATIC_BATCH_SIZE} "
            "for --static."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help=f"Training steps. Default: {DEFAULT_STEPS}.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times through the text, instead of --steps.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help=f"Peak learning rate, linear warm-up and decay. Default: {RECIPES['distillcse'].lr:g} for distillcse, "
            f"{RECIPES['focal'].lr:g} for the others; {STATIC_LR:g} for --static, {STATIC_INIT_LR:g} with --init."
        ),
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps that warm up.")] = DEFAULTS.warmup,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = DEFAULTS.weight_decay,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens that training text is cut at; evaluation reads as far as the encoder can. Default: "
            f"{MAX_LENGTH}; {STATIC_MAX_LENGTH} for --static."
        ),
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help=f"Steps between evaluations. Default: {EVALUATIONS} evaluations a run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of dropout and of the order of the text.")] = DEFAULTS.seed,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = DEFAULTS.device,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision in bfloat16.")] = False,
) -> None:
    """Train a sentence encoder and evaluate it before and after.

    Writes model/, metrics.json and curves.png to the output folder, and nothing elsewhere but in --cache-teachers. With
    the defaults it needs no network. Several processes train one model together, with the same options: torchrun
    --nproc-per-node 2 -m pycse train.
    """
    options = {name: value for name, value in locals().items() if name not in ("eval_file", "teacher")}
    with reported("train"):
        with ranks.together():
            settings = Settings(**options, eval_files=tuple(eval_file or ()), teachers=tuple(teacher or ()))
            settings.check()
            require_extras()
            quiet(is_local(init or model, settings.teachers))

        from rich.console import Console

        from pycse.training import report
        from pycse.training.train import train as run_training

        console = Console(markup=False, highlight=False)  # square brackets in file names are no markup
        run, folder = run_training(settings, console)
        finish(lambda: report.show_and_write(run, folder, console))


@app.command()
def sparsify(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face id or folder of the encoder. Default: the all-MiniLM-L6-v2 that comes with the training "
            "extras."
        ),
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help=SPARSITY_HELP)] = None,
    granularity: Annotated[str | None, typer.Option(help=GRANULARITY_HELP)] = None,
    scope: Annotated[str | None, typer.Option(help=SCOPE_HELP)] = None,
    block: Annotated[int | None, typer.Option(help=BLOCK_HELP)] = None,
    out: Annotated[
        str | None, typer.Option(help="New or empty folder to write to. Default: runs/sparsify-DATE-TIME.")
    ] = None,
    finetune_steps: Annotated[
        int | None, typer.Option(help="Steps of training after the removal, under the masks. Default: 0.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=f"Of --finetune-steps, one of {', '.join(name for name, one in RECIPES.items() if not one.prunes)}. "
            "distillcse: the encoder before the removal teaches what is left of it."
        ),
    ] = DEFAULTS.recipe,
    balance: Annotated[float | None, typer.Option(help=BALANCE_HELP)] = None,
    means: Annotated[str | None, typer.Option(help=MEANS_HELP)] = None,
    score_batches: Annotated[int | None, typer.Option(help=SCORE_HELP)] = None,
    train_file: Annotated[
        str | None,
        typer.Option(
            help="Text to score and train on, one example a line, as for pycse train. Pairs are the positives of the "
            "scores; "
            "otherwise dropout makes them. Default: English Wikipedia sentences that come with the training extras."
        ),
    ] = None,
    eval_file: Annotated[list[str] | None, typer.Option(help=EVAL_HELP, metavar="FILE")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a batch.")] = DEFAULTS.batch_size,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of --finetune-steps. Default: the recipe's.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Tokens that text is cut at, but for evaluation.")
    ] = DEFAULTS.max_length,
    seed: Annotated[int, typer.Option(help="Seed of dropout and of the order of the text.")] = DEFAULTS.seed,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = DEFAULTS.device,
) -> None:
    """Remove the parameters that contribute least to alignment and uniformity, and evaluate before and after.

    Writes model/ (for pycse.sparse.load), metrics.json and layers.png to the output folder, and with --finetune-steps
    curves.png. With the defaults it needs no network.
    """
    options = {name: value for name, value in locals().items() if name != "eval_file"}
    with reported("sparsify"):
        with ranks.together():
            if recipe in RECIPES and RECIPES[recipe].prunes:
                raise UserError(
                    f"--recipe {recipe} removes parameters itself; use it with pycse train, or another here"
                )
            settings = Settings(**options, layers="all", eval_files=tuple(eval_file or ()), prunes=True)
            settings.check()
            require_extras()
            quiet(is_local(model))

        from rich.console import Console

        from pycse.training import report
        from pycse.training.pruning import sparsify_run

        console = Console(markup=False, highlight=False)
        run, folder = sparsify_run(settings, console)
        finish(lambda: report.show_and_write(run, folder, console))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hugging Face id or folder of the encoder.")],
    eval_file: Annotated[list[str] | None, typer.Option(help=EVAL_HELP, metavar="FILE")] = None,
    layers: Annotated[str, typer.Option(help="Layers to keep, from 0, as in 0,2,4.")] = "all",
    batch_size: Annotated[int, typer.Option(help="Texts embedded at a time.")] = 64,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = DEFAULTS.device,
    json: Annotated[str | None, typer.Option(help="New file to write the scores to as well.")] = None,
) -> None:
    """Print Spearman on the Lee documents and on every --eval-file, alignment and uniformity."""
    with reported("eval"):
        if not ranks.first():  # it is the work of one
            return
        Settings(device=device, batch_size=batch_size).check()
        if json is not None and Path(json).exists():
            raise UserError(f"--json {json} exists and is not overwritten; give a new file")
        if json is not None and not Path(json).absolute().parent.is_dir():
            raise UserError(f"--json {json}: there is no folder {Path(json).parent}; make it first")
        require_extras()
        quiet(is_local(model))

        from rich.console import Console

        from pycse.training import report
        from pycse.training.encoder import keep_layers, load_encoder, parse_layers, resolve_model
        from pycse.training.eval_sets import evaluation_sets
        from pycse.training.evaluate import check_ranking
        from pycse.training.evaluate import evaluate as scores_of

        keep = parse_layers(layers)
        sets = evaluation_sets(tuple(eval_file or ()))
        encoder = load_encoder(resolve_model(model)[0], device)
        if keep is not None:
            keep_layers(encoder, keep)
        scores = scores_of(encoder, sets, batch_size)
        check_ranking(model, scores)
        Console(markup=False, highlight=False).print(
            report.scores_table({"score": scores}, title=f"Evaluation of {model}")
        )
        if json is not None:
            report.write_json({"model": model, "scores": scores}, Path(json))


def main() -> None:
    """Entry point of the `pycse` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets a poorer curve, not a traceback
    if ranks.first():
        app(prog_name="pycse")
        return
    # Help, and what is wrong with the command line, come from rank 0 alone.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            sys.exit(app(prog_name="pycse", standalone_mode=False))
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
