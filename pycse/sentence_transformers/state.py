"""A loss' trained numbers in the trainer's checkpoints."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from pycse.sentence_transformers.columns import ColumnLoss


class LossState(TrainerCallback, ExportableState):
    """Saves a loss' own parameters (a trained temperature or m), and the state of its shuffle's generator, with each
    checkpoint, in its trainer_state.json; restores them where training resumes from one, and with
    ``load_best_model_at_end`` those of the best.

        trainer = SentenceTransformerTrainer(model=model, loss=loss, callbacks=[LossState(loss)], ...)

    Args:
        loss: one loss, or a dict of losses by dataset, as the trainer takes them.
    """

    def __init__(self, loss: nn.Module | dict[str, nn.Module]) -> None:
        self.losses = loss if isinstance(loss, dict) else {"loss": loss}
        for one in self._modules().values():
            one.state_kept = True

    def _modules(self) -> dict[str, ColumnLoss]:
        """Those of ours, also within wrappers."""
        found: dict[str, ColumnLoss] = {}
        for key, one in self.losses.items():
            for prefix, module in one.named_modules():
                if isinstance(module, ColumnLoss):
                    found[".".join(filter(None, (key, prefix)))] = module
        return found

    def state(self) -> dict[str, Any]:
        """For the trainer: numbers as numbers, a generator's state in base64."""
        numbers, generators = {}, {}
        for name, module in self._modules().items():
            for own, p in module.named_parameters(recurse=False):
                numbers[f"{name}.{own}"] = p.detach().double().tolist()
            if (generator := getattr(module, "generator", None)) is not None:
                generators[name] = base64.b64encode(bytes(generator.get_state().tolist())).decode()
        return {"args": {}, "attributes": {"numbers": numbers, "generators": generators}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 0:
            self._restore(state.stateful_callbacks, f"the checkpoint of step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            file = Path(state.best_model_checkpoint) / "trainer_state.json"
            if file.exists():
                self._restore(json.loads(file.read_text())["stateful_callbacks"], str(file))

    def _restore(self, saved: dict[str, Any], where: str) -> None:
        if "LossState" not in saved:
            raise ValueError(
                f"{where} was saved without LossState, so the loss' trained numbers are not in it. Without LossState "
                "training goes on with those given"
            )
        found = saved["LossState"]["attributes"]
        for name, module in self._modules().items():
            for own, p in module.named_parameters(recurse=False):
                if f"{name}.{own}" not in found["numbers"]:
                    raise ValueError(f"{where} has no {name}.{own}, only {sorted(found['numbers'])}")
                with torch.no_grad():
                    p.copy_(torch.tensor(found["numbers"][f"{name}.{own}"], dtype=torch.float64, device="cpu"))
            if (generator := getattr(module, "generator", None)) is not None and name in found["generators"]:
                state = list(base64.b64decode(found["generators"][name]))
                generator.set_state(torch.tensor(state, dtype=torch.uint8, device="cpu"))
