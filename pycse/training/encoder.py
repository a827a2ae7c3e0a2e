"""The encoder to start from: loading it, keeping only some of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pycse.training.errors import UserError
from pycse.training.names import did_you_mean, fetched

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from pycse.training.settings import Settings

_stored: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # encoder -> dtype of the weights in its folder

CASE_SAMPLE = 64  # pairs that show whether a tokenizer knows case


def parse_layers(text: str | None) -> list[int] | None:
    """ "0,2,4" -> [0, 2, 4]; "all" or None -> None, which keeps every layer."""
    if text is None or text.strip().lower() == "all":
        return None
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--layers {text!r}: give layer numbers from 0, as in 0,2,4, or all") from None
    if layers != sorted(set(layers)) or layers[0] < 0:
        raise UserError(f"--layers {text}: give each layer once, from 0, in rising order, as in 0,2,4")
    return layers


def load_encoder(
    name: str,
    device: str = "auto",
    *,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> SentenceTransformer:
    """Load a sentence-transformers or transformers model (mean pooling is added to the latter), with its masks.

    Args:
        name: folder or Hugging Face id, of which the files are fetched first.
        dtype: of the weights in memory, by its name; None: as they are stored, which `stored_dtype` knows later.
        attn_implementation: of transformers; None leaves it to the model.
        trust_remote_code: run Python code that lies in the folder.
        allow_pickle: read weights that are no safetensors, by torch's restricted unpickler.

    Raises:
        UserError: the model cannot be read, asks for more than that (model_folder.py), or is not what was saved
            (loaded.py).
    """
    import torch
    from sentence_transformers import SentenceTransformer

    from pycse.loaded_weights import WrongWeights, loading_reports
    from pycse.model_folder import UntrustedModel, check_folder
    from pycse.sparse.storage import masks_expected, register, restore_saved
    from pycse.training.loaded import check_loaded
    from pycse.training.pooling import freeze_layer_weights

    absent = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if absent.get(device):
        raise UserError(f"--device {device}: torch {torch.__version__} finds none here; use --device cpu")
    trusted = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    arguments: dict[str, Any] = {"use_safetensors": None if allow_pickle else True, "weights_only": True}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    try:
        folder = Path(name) if Path(name).is_dir() else fetched(name, **trusted)
        check_folder(folder, **trusted)
        register()
        with masks_expected(), loading_reports() as reports:
            encoder = SentenceTransformer(
                str(folder),
                device=None if device == "auto" else device,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                model_kwargs=arguments,
            )
        restore_saved(encoder, folder)
        freeze_layer_weights(encoder)
        _stored[encoder] = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
        encoder = encoder if dtype is None else encoder.to(getattr(torch, dtype))
        if (attn_implementation or "").startswith("flash") and encoder.dtype == torch.float32:
            raise UserError(
                f"--attn-implementation {attn_implementation} works in 16 bits, and the weights are in float32; give "
                "--dtype bfloat16, or --attn-implementation sdpa"
            )
        check_loaded(encoder, reports)
        return encoder
    except (UserError, UntrustedModel, WrongWeights) as error:
        raise UserError(f"cannot load the model {name}: {error}") from error
    except BaseException as error:  # loaders raise many kinds for a damaged folder, an unknown id, a missing network
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust, in tokenizers
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        near = "" if Path(name).is_dir() else did_you_mean(name)
        raise UserError(
            f"cannot load the model {name} ({reason}); give a model folder or a Hugging Face id{near}"
        ) from error


def loading_options(settings: Settings, *, training: bool = False) -> dict[str, Any]:
    """load_encoder's keyword arguments as the settings have them.

    Args:
        training: of the encoder that is trained. Its weights are in float32 unless --dtype says otherwise: steps are
            smaller than what 16 bits can tell apart.
    """
    return {
        "dtype": settings.dtype or ("float32" if training else None),
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
        "allow_pickle": settings.allow_pickle,
    }


def stored_dtype(encoder: SentenceTransformer) -> torch.dtype:
    """The dtype that an encoder's weights had in its folder."""
    return _stored.get(encoder) or next(p.dtype for p in encoder.parameters() if p.is_floating_point())


def keep_layers(encoder: SentenceTransformer, keep: list[int] | None) -> int:
    """Keep only these transformer layers, in place; the number of layers there were before."""
    from torch import nn

    from pycse.training.pooling import is_first_last, set_pooling

    backbone = transformer(encoder)
    config = backbone.config
    count = getattr(config, "num_hidden_layers", 0)
    if keep is None:
        return count
    lists = [
        (f"{above}.{name}", parent, name)
        for above, parent in backbone.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    # A T5 of two layers has lists of two inside each.
    stacks = [one for one in lists if not any(one[0].startswith(f"{other}.") for other, _, _ in lists)]
    if len(stacks) != 1:
        raise UserError(f"--layers: cannot find the layers of a {type(backbone).__name__}; use --layers all")
    if keep[-1] >= count:
        raise UserError(f"--layers {','.join(map(str, keep))}: the model has layers 0 to {count - 1}")
    _, parent, name = stacks[0]
    layers = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(layers[i] for i in keep))
    # One entry a layer, where layers differ in kind or size.
    for entry in ("layer_types", "shrunk_heads", "shrunk_neurons"):
        if values := getattr(config, entry, None):
            setattr(config, entry, [values[i] for i in keep])
    config.num_hidden_layers = len(keep)
    if is_first_last(encoder):
        set_pooling(encoder, "first-last")
    return count


def transformer(encoder: SentenceTransformer):
    """The transformers model inside; UserError for encoders without one (static embeddings, bags of words)."""
    backbone = getattr(encoder[0], "auto_model", None)
    if backbone is None:
        raise UserError("this model has no transformer inside; give one that has")
    return backbone


def check_for_training(encoder: SentenceTransformer, by_dropout: bool, max_length: int) -> None:
    """Raise UserError where two views of a sentence would be equal, or texts longer than the encoder's positions.

    Args:
        by_dropout: dropout makes the views.
    """
    from torch import nn

    from pycse.training.loaded import position_limit

    if by_dropout and not any(isinstance(module, nn.Dropout) and module.p > 0 for module in encoder.modules()):
        raise UserError("this model has no dropout, so both views of a sentence are equal; give pairs in --train-file")
    positions = position_limit(encoder)
    if positions and max_length > positions:
        raise UserError(f"--max-length is {max_length}; this model reads at most {positions} tokens")


def check_case(encoder: SentenceTransformer, pairs: list[tuple[str, ...]]) -> None:
    """Raise UserError where a tokenizer does not see what --positives switch-case has changed."""
    import torch

    from pycse.sentence_transformers.texts import hashes

    changed = [pair for pair in pairs if pair[0] != pair[1]][:CASE_SAMPLE]
    seen = [hashes(encoder.preprocess(list(column))) for column in zip(*changed)]
    if not changed or (seen[0] is not None and seen[1] is not None and torch.equal(seen[0], seen[1])):
        raise UserError(
            "--positives switch-case: this model's tokenizer knows no case, so both views are the same text; take a "
            "cased model, or --positives dropout"
        )
