"""Folders of transformers models of many architectures with random weights, small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS)]
SIZES = {
    "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
ENDS = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}


def plain(name: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**(SIZES | more)))

    return make


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": len(VOCABULARY), "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes))


def distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertModel

    sizes = {"vocab_size": len(VOCABULARY), "dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64}
    return DistilBertModel(DistilBertConfig(**sizes, max_position_embeddings=64))


MADE: dict[str, Callable[[], Any]] = {
    "bert": plain("Bert", max_position_embeddings=64),
    "roberta": plain("Roberta", max_position_embeddings=64, pad_token_id=0),
    "xlm-roberta": plain("XLMRoberta", max_position_embeddings=64, pad_token_id=0),
    "mpnet": plain("MPNet", max_position_embeddings=64, pad_token_id=0),
    "electra": plain("Electra", max_position_embeddings=64, embedding_size=16),
    "albert": plain("Albert", max_position_embeddings=64, embedding_size=16),
    "deberta-v2": plain("DebertaV2", max_position_embeddings=64, relative_attention=True, position_buckets=16, pos_att_type=["c2p", "p2c"]),
    "modernbert": plain("ModernBert", **ENDS),
    "llama": plain("Llama", max_position_embeddings=64),
    "distilbert": distilbert,
    "t5": t5,
}  # fmt: skip


def tokenizer(folder: Path, limit: int | None = 64) -> None:
    """Files of a tokenizer that knows single letters; without a limit it is one of 1e30, as transformers has it."""
    from transformers import BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    more = {} if limit is None else {"model_max_length": limit}
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), **more).save_pretrained(folder)
    (folder / "vocab.txt").unlink()


def make(folder: Path, name: str, limit: int | None = 64, seed: int = 0, scale: float = 1.0) -> Path:
    """A model's folder. Its norms are not 1, as those of trained models are not."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(folder, limit)
    torch.manual_seed(seed)
    model = MADE[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.mul_(scale)
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path = folder / file
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | changes), encoding="utf-8")


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a folder."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
