"""Sparse encoders on disk: masks lie beside the weights they belong to, and `load` puts them to work again.

    weights of a layer    NAME.weight, with zeros where the mask has them
    its mask              NAME.mask_bits, a bit a weight (pack_mask)
    configuration         pycse_sparse: {"pattern": ...} for masks; shrunk_heads and shrunk_neurons (shrunk_encoders.py)

save_pretrained of a transformers model or a SentenceTransformer writes all of that. A loader that knows no masks reads
the weights alone: a dense encoder with the same embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pycse import validation
from pycse.pattern import unpack_mask
from pycse.sparse.choice import PATTERNS
from pycse.sparse.derived import BITS
from pycse.sparse.linear import SparseLinear
from pycse.sparse.views import is_sentence_transformer

KEY = "pycse_sparse"


def load(path: str | Path, device: str | torch.device | None = None) -> Any:
    """Load an encoder that `sparsify` changed and save_pretrained wrote; it runs no code from the folder.

    Args:
        path: folder of a SentenceTransformer or a transformers model. One that is not sparse loads as it is.
        device: where to; None leaves it to the library.

    Returns:
        A SentenceTransformer where the folder holds one, a transformers model otherwise, in evaluation mode.

    Raises:
        FileNotFoundError: no such folder.
        TypeError, ValueError: the folder holds no model, or masks that do not fit its weights.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be the folder of a saved model; {path} is none")
    whole = (folder / "modules.json").is_file()
    if not whole and not (folder / "config.json").is_file():
        raise ValueError(f"path must be the folder of a saved model; {path} has neither modules.json nor config.json")
    register()
    with masks_expected():
        if whole:
            from sentence_transformers import SentenceTransformer

            encoder: Any = SentenceTransformer(str(folder), device=None if device is None else str(device))
        else:
            encoder = encoder_class(folder).from_pretrained(str(folder))
            encoder = encoder if device is None else encoder.to(device)
    restore_saved(encoder, folder)
    return encoder.eval()


def encoder_class(folder: Path) -> Any:
    """AutoModel, but for the encoders of encoder-decoders (T5EncoderModel and its like), to which it adds a decoder."""
    import transformers

    (saved,) = (transformers.AutoConfig.from_pretrained(str(folder)).architectures or [""])[:1]
    return getattr(transformers, saved if saved.endswith("EncoderModel") else "AutoModel", transformers.AutoModel)


def restore_saved(encoder: nn.Module, folder: Path) -> int:
    """Give a freshly loaded encoder the masks that lie in its folder; how many there were."""
    model: Any = encoder
    if is_sentence_transformer(encoder):
        model = getattr(encoder[0], "auto_model", None)  # type: ignore[index]
        if model is None:  # static embeddings and the like
            return 0
    masks = saved_masks(transformer_folder(folder))
    # A model with a head has its encoder's names below a prefix, and AutoModel leaves the head out.
    prefix = f"{model.base_model_prefix}."
    if any(key.startswith(prefix) for key in masks):
        masks = {key.removeprefix(prefix): mask for key, mask in masks.items() if key.startswith(prefix)}
    settings = getattr(model.config, KEY, None) or {}
    restore(model, masks, settings.get("pattern", "auto"))
    if masks:
        note(model, settings.get("pattern", "auto"))
    return len(masks)


def restore(module: nn.Module, state_dict: Mapping[str, Tensor], pattern: str = "auto") -> nn.Module:
    """Put a SparseLinear in the place of every nn.Linear whose mask is in a state_dict, in place; other entries are not
    read.

    For modules that are no transformers models: `restore(module, state)`, then `module.load_state_dict(state)`.

    Args:
        module: as it was before `sparsify`.
        state_dict: of the sparse module, or its masks alone: NAME.mask_bits, int32 (out, ceil(in / 32)).
        pattern: of the kernels, as in SparseLinear.from_dense.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: a mask has no layer in the module, or another shape or dtype; an unknown pattern. The
        module
            is then as it was.
    """
    validation.choice("pattern", pattern, PATTERNS)
    made = []
    for key, bits in state_dict.items():
        name, _, last = key.rpartition(".")
        if last != BITS:
            continue
        if not name:
            raise ValueError(
                f"module must hold the layers of state_dict, whose {key} is that of a layer alone: "
                f"make a SparseLinear and load it"
            )
        try:
            linear = module.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"state_dict must be of this module: {key} is the mask of no nn.Linear in it")
        validation.packed_mask(key, bits, linear.weight, anywhere=True)
        mask = unpack_mask(bits.to(linear.weight.device), linear.in_features)
        made.append((name, SparseLinear.from_dense(linear, mask, pattern)))
    for name, sparse in made:
        place(module, name, sparse)
    return module


def place(module: nn.Module, name: str, child: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)


def note(model: nn.Module, pattern: str) -> None:
    """Write into a model's configuration that there are masks, and the pattern that was asked for."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        setattr(config, KEY, {"pattern": pattern})


def register() -> None:
    """Let the Auto classes of transformers find the shrunk encoders, without code from a folder; in this process
    only."""
    from transformers import AutoConfig, AutoModel

    from pycse.sparse.shrunk_encoders import SHRUNK

    for model, config, _ in SHRUNK.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]
        AutoModel.register(config, model, exist_ok=True)


def transformer_folder(folder: Path) -> Path:
    """Where a saved encoder's transformer lies: the folder, or the one that modules.json names first."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return folder / modules[0]["path"]
    except OSError:
        return folder
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / 'modules.json'} cannot be read ({error})") from error


def saved_masks(folder: Path) -> dict[str, Tensor]:
    """The masks in a folder's safetensors files."""
    from safetensors import SafetensorError, safe_open

    masks = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = [key for key in tensors.keys() if key.endswith(f".{BITS}")]  # noqa: SIM118
                masks.update({name: tensors.get_tensor(name) for name in names})
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error})") from error
    return masks


@contextmanager
def masks_expected():
    """Keep transformers from reporting masks as unexpected, and nothing else."""
    from transformers import PreTrainedModel

    before = PreTrainedModel._keys_to_ignore_on_load_unexpected
    PreTrainedModel._keys_to_ignore_on_load_unexpected = [*(before or []), rf"\.{BITS}$"]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_unexpected = before
