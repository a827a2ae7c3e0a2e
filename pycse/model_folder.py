"""What a model's folder may hold before it is read: no foreign code, no pickles, no way out of the folder.

A folder is somebody else's: unpacked, downloaded, shared. The libraries that load it follow the names in its JSON
files, so those names are read here first:

    modules.json                the modules, each with a class and a folder of its own
    *.json with an auto_map     Python files of the folder that transformers would run
    *.index.json                the files that sharded weights lie in
    sentence_bert_config.json   arguments for from_pretrained

Everything raises UntrustedModel, whose text is one line and names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

# Modules of sentence-transformers that read nothing but tensors and settings.
MODULES = {
    "Transformer", "StaticEmbedding", "BoW", "CNN", "Dense", "Dropout", "LayerNorm", "LSTM", "Normalize", "Pooling",
    "WeightedLayerPooling", "WordEmbeddings", "WordWeights", "CLIPModel", "Router", "Asym",
}  # fmt: skip
NESTED = ("Router", "Asym")  # have modules of their own, in folders below theirs
# Model types of pycse.sparse.shrunk_encoders: their auto_map is for loaders without pycse, which has the classes.
OWN_TYPES = "pycse_shrunk_"
OWN_CODE = "shrunk_encoders."
# What a folder may ask of from_pretrained. Among the rest are other weights, other files and weights_only=False.
ARGUMENTS = {
    "attn_implementation", "dtype", "torch_dtype", "model_max_length", "padding_side", "truncation_side", "use_fast",
    "do_lower_case", "output_hidden_states", "max_length", "add_eos_token", "add_bos_token", "add_pooling_layer",
    "use_cache", "is_causal", "reference_compile", "clean_up_tokenization_spaces", "fix_mistral_regex", "backend",
}  # fmt: skip
DEEPEST = 50  # levels of a settings file; the libraries that read it walk it with functions that call themselves
SAFE_INDEX = ".safetensors.index.json"
SINGLE_PICKLE = "pytorch_model.bin"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class UntrustedModel(ValueError):
    """A model's folder asks for more than to be read."""


def check_folder(folder: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> None:
    """Raise UntrustedModel where loading a folder would run its code, unpickle, or read files elsewhere.

    Args:
        folder: with modules.json or config.json.
        allow_pickle: weights may be a pickle where there are no safetensors.
        trust_remote_code: code may be the folder's. Its file names have to stay inside all the same.

    Raises:
        UntrustedModel: also for JSON that cannot be read.
    """
    folder = folder.absolute()
    for module in read_modules(folder):
        kind = module["type"]
        if not trust_remote_code and not (kind.startswith("sentence_transformers.") and kind.split(".")[-1] in MODULES):
            raise UntrustedModel(
                f"{folder / 'modules.json'} names foreign code ({kind}), which is not run; trust_remote_code "
                "(--trust-remote-code) runs it, if you trust its author"
            )
    for place in module_folders(folder):
        if (place / "adapter_config.json").exists():
            raise UntrustedModel(
                f"{place} is an adapter, and names the model that it belongs to, which lies elsewhere; merge the two "
                "(peft: merge_and_unload) and give the folder of the result"
            )
        check_links(folder, place)
        for file in sorted(place.glob("*.json")):
            check_json(folder, place, file, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        check_pickles(place, allow_pickle)


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UntrustedModel(f"{file} cannot be read as JSON ({str(error).splitlines()[0]})") from error


def read_modules(folder: Path) -> list[dict[str, str]]:
    """The entries of modules.json, each with a path and a type; none where there is no such file."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    modules = read_json(file)
    if not isinstance(modules, list) or not modules:
        raise UntrustedModel(f"{file} must be a list of modules, got {str(modules)[:60]}")
    for module in modules:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("path", "type")):
            raise UntrustedModel(f"{file}: each module must have a path and a type, got {str(module)[:60]}")
    return modules


def module_folders(folder: Path) -> list[Path]:
    """Where a model's modules lie, the transformer's first: the folder itself for a model of transformers."""
    places = []
    for module in read_modules(folder):
        place = inside(folder, folder / module["path"], "modules.json")
        places.append(place)
        if module["type"].split(".")[-1] in NESTED and place.is_dir():
            below = sorted(path for path in place.rglob("*") if path.is_dir())
            places += [inside(folder, path, str(path.relative_to(folder))) for path in below]
    return [place for place in dict.fromkeys(places or [folder]) if place.is_dir()]


def transformer_folder(folder: Path) -> Path:
    """Where a saved encoder's transformer lies: the folder, or the one that modules.json names first."""
    modules = read_modules(folder)
    return inside(folder, folder / modules[0]["path"], "modules.json") if modules else folder


def inside(folder: Path, path: Path, named_in: str) -> Path:
    """The path; UntrustedModel where it, or what a link there points to, is not in the folder."""
    name = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
    # Of another system too: a folder is unpacked anywhere.
    parts = PureWindowsPath(name)
    out = not path.is_relative_to(folder) or ".." in parts.parts or bool(parts.anchor) or "\0" in name
    if out or not any(path.resolve().is_relative_to(root) for root in roots(folder)):
        raise UntrustedModel(f"{folder / named_in} leads out of the folder, to {name}; files must lie in it")
    return path


def roots(folder: Path) -> list[Path]:
    """Where a folder's files may lie: in it, and for one of Hugging Face's cache beside it, where its links point.

    Those blobs are a folder of its own: as a link, in an archive that was unpacked, they would be any place.
    """
    blobs = folder.parent.parent.resolve() / "blobs"
    cached = [blobs] if folder.parent.name == "snapshots" and blobs.resolve() == blobs else []
    return [folder.resolve(), *cached]


def check_links(folder: Path, place: Path) -> None:
    """No link among a module's files may point out of the model's folder."""
    for file in place.iterdir():
        if file.is_symlink():
            inside(folder, file, str(file.relative_to(folder)))


def check_json(folder: Path, place: Path, file: Path, *, allow_pickle: bool, trust_remote_code: bool) -> None:
    """Check what a settings file of a module names. Files of other kinds (tokenizers, vocabularies) name nothing."""
    if file.name.endswith(".index.json"):
        check_index(folder, place, file, allow_pickle)
        return
    if not (file.name.endswith("config.json") or file.name.startswith("sentence_")):
        return
    values = read_json(file)
    if depth(values) > DEEPEST:
        raise UntrustedModel(f"{file} is nested {DEEPEST} levels deep and more, which no settings are")
    if not isinstance(values, dict):
        return
    code = list(named(values, "auto_map"))
    if any(code) and not trust_remote_code and not is_own(values, code):
        raise UntrustedModel(
            f"{file} names foreign code ({', '.join(sorted(map(str, strings(code))))}), which is not run; "
            "trust_remote_code (--trust-remote-code) runs it, if you trust its author"
        )
    for weights in named(values, "transformers_weights"):
        check_weights_name(folder, place, file, weights, allow_pickle)
    # Attention, and whatever else may have several kernels.
    elsewhere = [text for text in strings(list(named(values, "_implementation"))) if "/" in text]
    if elsewhere and not trust_remote_code:
        raise UntrustedModel(f"{file} asks for code of another place ({elsewhere[0]}), which is not run")
    if file.name.startswith("sentence_"):
        check_arguments(file, values)


def check_weights_name(folder: Path, place: Path, file: Path, weights: Any, allow_pickle: bool) -> None:
    """What a configuration's transformers_weights names: safetensors or an index of them, in the model's folder."""
    if weights is None:
        return
    if not isinstance(weights, str) or not weights.endswith((".safetensors", SAFE_INDEX)):
        raise UntrustedModel(f"{file}: transformers_weights must name a safetensors file, got {str(weights)[:60]}")
    path = inside(folder, place / weights, str(file.relative_to(folder)))
    if weights.endswith(SAFE_INDEX) and path.is_file():
        check_index(folder, place, path, allow_pickle)


def check_index(folder: Path, place: Path, index: Path, allow_pickle: bool) -> None:
    """The files of sharded weights lie in the model's folder.

    transformers looks for them from the module's folder, wherever the index lies.
    """
    for name in shards(index, allow_pickle):
        inside(folder, place / name, str(index.relative_to(folder)))


def check_arguments(file: Path, values: dict[str, Any]) -> None:
    """A module's settings may not ask from_pretrained for other files than its own."""
    elsewhere = values.get("tokenizer_name_or_path")
    if elsewhere:
        raise UntrustedModel(f"{file} leads out of the folder, to the tokenizer {elsewhere}; files must lie in it")
    for key in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"):
        given = values.get(key) or {}
        # sentence-transformers drops trust_remote_code itself.
        unknown = sorted(set(given) - ARGUMENTS - {"trust_remote_code"}) if isinstance(given, dict) else [str(given)]
        if unknown or any("/" in text or "\\" in text for text in strings(given)):
            what = f" ({', '.join(unknown)[:60]})" if unknown else ""
            raise UntrustedModel(f"{file}: {key} asks for what a model's folder may not say{what}; take it out")


def is_own(values: dict[str, Any], code: Any) -> bool:
    """Whether an auto_map is that of a shrunk encoder, which pycse knows without it."""
    kind = values.get("model_type")
    own = isinstance(kind, str) and kind.startswith(OWN_TYPES)
    return own and all(name.startswith(OWN_CODE) for name in strings(code))


def depth(value: Any) -> int:
    """Levels of lists and dictionaries."""
    level, levels = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        level = [below for one in level for below in (one.values() if isinstance(one, dict) else one)]
        levels += 1
    return levels


def named(value: Any, ending: str) -> Iterator[Any]:
    """What keys with this ending have, at any depth."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key.endswith(ending):
                yield one
            yield from named(one, ending)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from named(one, ending)


def strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from strings(one)


def shards(index: Path, allow_pickle: bool) -> list[str]:
    """File names in an index of sharded weights. One of safetensors names no others: transformers takes whatever stands
    there, by its ending, also where it was told to read safetensors alone."""
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UntrustedModel(f"{index} must have a weight_map of file names")
    others = [name for name in names.values() if not name.endswith(".safetensors")]
    if others and index.name.endswith(SAFE_INDEX) and not allow_pickle:
        raise UntrustedModel(
            f"{index} names weights that are no safetensors ({others[0][:60]}), which can run code; save them as "
            "safetensors, or allow it (--allow-pickle), if you trust its author"
        )
    return list(dict.fromkeys(names.values()))


def check_pickles(place: Path, allow_pickle: bool) -> None:
    """Weights are safetensors, or a pickle where that is allowed.

    Safetensors count by the names that are read: another file beside a pickle would hide it. sentence-transformers'
    own modules know model.safetensors alone, and take SINGLE_PICKLE where there is none; transformers, which is told to
    read safetensors, knows the other names too.
    """
    if allow_pickle or (place / "model.safetensors").is_file():
        return
    pickles = sorted(file.name for pattern in PICKLES for file in place.glob(pattern))
    if has_other_safetensors(place):
        pickles = [name for name in pickles if name == SINGLE_PICKLE]
    if pickles:
        raise UntrustedModel(
            f"{place} has its weights as a pickle ({pickles[0]}), which can run code; save them as safetensors, or "
            "allow it (--allow-pickle), if you trust its author"
        )


def has_other_safetensors(place: Path) -> bool:
    """Whether transformers finds safetensors in a module's folder by another name than model.safetensors."""
    file = place / "config.json"
    settings = read_json(file) if file.is_file() else None
    named_here = settings.get("transformers_weights") if isinstance(settings, dict) else None
    return (place / f"model{SAFE_INDEX}").is_file() or (named_here is not None and (place / named_here).is_file())
