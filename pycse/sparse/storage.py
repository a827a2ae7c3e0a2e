"""Sparse encoders on disk: masks lie beside the weights they belong to, and `load` puts them to work again.

    weights of a layer    NAME.weight, with zeros where the mask has them
    its mask              NAME.mask_bits, a bit a weight (pack_mask)
    configuration         pycse_sparse: {"pattern": ...} for masks; shrunk_heads and shrunk_neurons (shrunk_encoders.py)

save_pretrained of a transformers model or a SentenceTransformer writes all of that. A loader that knows no masks reads
the weights alone: a dense encoder with the same embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pycse import validation
from pycse.loaded_weights import check_weights, embeddings_of_texts, embeddings_of_tokens, loading_reports
from pycse.model_folder import check_folder, transformer_folder
from pycse.pattern import unpack_mask
from pycse.sparse.choice import PATTERNS
from pycse.sparse.derived import BITS
from pycse.sparse.linear import SparseLinear
from pycse.sparse.views import is_sentence_transformer

KEY = "pycse_sparse"


def load(path: str | Path, device: str | torch.device | None = None) -> Any:
    """Load an encoder that `sparsify` changed and save_pretrained wrote; it runs no code from the folder, and reads no
    pickles and no files outside it.

    Args:
        path: folder of a SentenceTransformer or a transformers model. One that is not sparse loads as it is.
        device: where to; None leaves it to the library.

    Returns:
        A SentenceTransformer where the folder holds one, a transformers model otherwise, in evaluation mode.

    Raises:
        FileNotFoundError: no such folder.
        TypeError, ValueError: the folder holds no model, masks that do not fit its weights, other weights than the
            model uses (WrongWeights of pycse.loaded_weights), or asks for more than to be read (UntrustedModel of
            pycse.model_folder).
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be the folder of a saved model; {path} is none")
    whole = (folder / "modules.json").is_file()
    if not whole and not (folder / "config.json").is_file():
        raise ValueError(f"path must be the folder of a saved model; {path} has neither modules.json nor config.json")
    check_folder(folder)
    register()
    read: dict[str, Any] = {"use_safetensors": True, "weights_only": True}
    with masks_expected(), loading_reports() as reports:
        if whole:
            from sentence_transformers import SentenceTransformer

            where = None if device is None else str(device)
            encoder: Any = SentenceTransformer(str(folder), device=where, local_files_only=True, model_kwargs=read)
        else:
            encoder = encoder_class(folder).from_pretrained(str(folder), local_files_only=True, **read)
            encoder = encoder if device is None else encoder.to(device)
    encoder.eval()
    for model, report in reports:
        check_weights(model, report, embeddings_of_texts(encoder) if whole else embeddings_of_tokens(encoder))
    restore_saved(encoder, folder)
    return encoder.eval()


def encoder_class(folder: Path) -> Any:
    """AutoModel, but for the encoders of encoder-decoders (T5EncoderModel and its like), to which it adds a decoder."""
    import transformers

    named = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True).architectures
    saved = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return getattr(transformers, saved if saved.endswith("EncoderModel") else "AutoModel", transformers.AutoModel)


def restore_saved(encoder: nn.Module, folder: Path) -> int:
    """Give a freshly loaded encoder the masks that lie in its folder; how many there were."""
    model: Any = encoder
    if is_sentence_transformer(encoder):
        model = getattr(encoder[0], "auto_model", None)  # type: ignore[index]
        if model is None:  # static embeddings and the like
            return 0
    place = transformer_folder(folder)
    masks = saved_masks(place, model)
    pattern = saved_pattern(model, place)
    check_zeros(model, masks, place)
    restore(model, masks, pattern)
    if masks:
        note(model, pattern)
    return len(masks)


def saved_pattern(model: nn.Module, folder: Path) -> str:
    """The pattern in a model's configuration; ValueError for anything that is none."""
    settings = getattr(model.config, KEY, None) or {}
    pattern = settings.get("pattern", "auto") if isinstance(settings, dict) else None
    if not isinstance(pattern, str) or pattern not in PATTERNS:
        raise ValueError(
            f"{folder / 'config.json'}: {KEY} must have a pattern of {', '.join(PATTERNS)}, got {settings!r:.60}"
        )
    return pattern


def check_zeros(model: nn.Module, masks: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ValueError where a weight is not 0 though its mask has removed it: the masks are then of other weights, and
    loaders that know no masks would give other embeddings."""
    for key, bits in masks.items():
        linear: Any = model.get_submodule(key.rpartition(".")[0])
        gone = ~unpack_mask(bits.to(linear.weight.device), linear.in_features)
        if linear.weight.detach()[gone].any():
            raise ValueError(f"{folder}: {key} removes weights that are not 0, so it is not of these weights")


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


def saved_masks(folder: Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The masks in a folder's safetensors files, by the names of the model's layers.

    Args:
        model: whose layers they have to fit. That is seen in the file's header, before anything of that size is made.

    Raises:
        ValueError: a file cannot be read, a mask is of no layer, or of another shape or dtype.
    """
    from safetensors import SafetensorError, safe_open

    masks: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found = [key for key in tensors.keys() if key.endswith(f".{BITS}")]  # noqa: SIM118
                names = encoder_names(found, model)
                for key, name in names.items():
                    header = tensors.get_slice(key)
                    if model is not None:
                        check_header(f"{file}: {key}", name, header.get_dtype(), header.get_shape(), model)
                    masks[name] = tensors.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error})") from error
    return masks


def encoder_names(keys: list[str], model: nn.Module | None) -> dict[str, str]:
    """Key in a file -> name in the encoder. A model with a head has its encoder's names below a prefix, and AutoModel
    leaves the head out."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix != "." and any(key.startswith(prefix) for key in keys):
        return {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    return {key: key for key in keys}


def check_header(shown: str, name: str, dtype: str, shape: list[int], model: nn.Module) -> None:
    """Raise ValueError unless a mask in a file is that of a layer."""
    try:
        linear = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{shown} is the mask of no nn.Linear in the model")
    expected = [linear.out_features, -(-linear.in_features // 32)]
    if dtype != "I32" or list(shape) != expected:
        raise ValueError(
            f"{shown} must be I32 of shape {expected} for its layer, got {dtype} of shape {list(shape)[:8]}"
        )


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
