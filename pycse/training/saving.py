"""Saving a model so that what is loaded again is what was trained: written, loaded, compared."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pycse.loaded_weights import CHARACTERS, embed, listed
from pycse.training import ranks
from pycse.training.encoder import load_encoder, loading_options, stored_dtype, transformer
from pycse.training.errors import UserError
from pycse.training.folder import umask
from pycse.training.heads import without_head

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from pycse.training.run import Run
    from pycse.training.settings import Settings

TEXTS = (
    "The old bridge was closed to traffic after the flood.",
    " ".join(CHARACTERS),
    "",
    "Two people play chess in a park, and 1 of them wins.",
)
# Largest ||a - b|| / ||b|| of an embedding saved and loaded. The same weights: kernels alone may differ.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Architectures whose layers are alike, and whose configuration says everything.
PLAIN = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "electra", "camembert")


def save_model(encoder: SentenceTransformer, folder: Path, settings: Settings, run: Run | None = None) -> None:
    """Save an encoder without its training head, in --save-dtype, load it again and compare; of several processes rank
    0 calls it.

    Args:
        folder: new or empty.
        run: for the model card; None writes none.

    Raises:
        UserError: what was loaded is not what was saved, or 16 bits cannot hold it. The folder is then there, to look
            at.
    """
    from pycse.training.model_card import card

    dtype = saved_dtype(encoder, settings.save_dtype)
    with without_head(encoder):
        saved = encoder
        if any(p.is_floating_point() and p.dtype != dtype for p in encoder.parameters()):
            saved = copy.deepcopy(encoder).to(dtype)
            if dtype == torch.float32 and attention_of(saved).startswith("flash"):  # which knows 16 bits alone
                transformer(saved).set_attn_implementation("sdpa")
        write(saved, folder)
        if not embeddings(saved).isfinite().all() and embeddings(encoder).isfinite().all():
            raise UserError(
                f"--save-dtype: {name_of(dtype)} cannot hold these weights, and embeddings are not finite; "
                f"{folder} is of no use. Give --save-dtype float32"
            )
        compare(folder, saved, settings, f"the model in {folder}")
    if run is not None:
        (folder / "README.md").write_text(card(run, encoder, name_of(dtype)), encoding="utf-8")


def write(encoder: SentenceTransformer, folder: Path) -> None:
    """save_pretrained without the model card of sentence-transformers, which quotes the training text."""
    encoder.save_pretrained(str(folder), create_model_card=False)
    # safetensors lets nobody but the user read its files, whatever the umask.
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~umask())


def check_saves(encoder: SentenceTransformer, settings: Settings, keep: list[int] | None) -> None:
    """Raise UserError where the encoder cannot be saved and loaded, before it is trained.

    Tried where layers were cut, and for architectures other than the common ones. In T5 and ModernBERT the first layer
    is not like the others: it has to be kept.
    """
    backbone: Any = transformer(encoder)
    if keep is None and backbone.config.model_type in PLAIN:
        return
    if not ranks.first():
        return
    what = (
        f"--layers {','.join(map(str, keep))}: what is left of this {type(backbone).__name__}"
        if keep is not None
        else f"this {type(backbone).__name__}"
    )
    advice = "; keep layer 0, which is special in some architectures, or --layers all" if keep else ""
    with tempfile.TemporaryDirectory(prefix="pycse-") as scratch, without_head(encoder):
        write(encoder, Path(scratch))
        compare(Path(scratch), encoder, settings, what, advice)


def compare(folder: Path, saved: SentenceTransformer, settings: Settings, what: str, advice: str = "") -> None:
    """Raise UserError unless the folder holds this encoder: the same weights, and embeddings of TEXTS."""
    options = loading_options(settings) | {"dtype": None, "allow_pickle": False}
    options["attn_implementation"] = attention_of(saved) or None
    try:
        with torch.random.fork_rng():  # a model that is made draws numbers
            loaded = load_encoder(str(folder), str(saved.device), **options)
    except UserError as error:
        reason = str(error).removeprefix(f"cannot load the model {folder}").removeprefix(":").strip()
        raise UserError(f"{what} cannot be loaded again ({reason}){advice}") from error
    # Embeddings alone do not tell: a norm that is left out changes nothing as long as its weights are 1.
    before, after = saved.state_dict(), loaded.state_dict()
    changed = sorted(set(before) ^ set(after))
    changed += [name for name in before if name in after and not torch.equal(before[name], after[name])]
    if changed:
        raise UserError(f"{what} is another one when it is loaded again: {listed(changed)} differ{advice}")
    expected, found = embeddings(saved), embeddings(loaded)
    apart = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)
    if not (apart <= CLOSE[next(p.dtype for p in saved.parameters() if p.is_floating_point())]).all():
        raise UserError(
            f"{what} is another one when it is loaded again: embeddings differ by {apart.max():.0%} of their "
            f"length{advice}"
        )


def attention_of(encoder: SentenceTransformer) -> str:
    """What computes the attention, in transformers' words; empty for encoders without one."""
    config = getattr(getattr(encoder[0], "auto_model", None), "config", None)
    return getattr(config, "_attn_implementation", None) or ""


@torch.no_grad()
def embeddings(encoder: SentenceTransformer) -> Tensor:
    """(len(TEXTS), D) of the texts, in float32 on the CPU."""
    return embed(encoder, list(TEXTS)).float().cpu()


def saved_dtype(encoder: SentenceTransformer, name: str) -> torch.dtype:
    """The dtype that weights are saved in; of an encoder in 8 bits or fewer, float32."""
    dtype = stored_dtype(encoder) if name == "as-loaded" else getattr(torch, name)
    return dtype if dtype in CLOSE else torch.float32


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
