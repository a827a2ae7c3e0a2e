"""A loss' trained numbers in the trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from pycse.sentence_transformers.columns import ColumnLoss

FILE = "loss_state.pt"


class LossState(TrainerCallback):
    """Saves a loss' own parameters (a trained temperature or m) with each checkpoint, and restores them where training
    resumes from one.

        trainer = SentenceTransformerTrainer(model=model, loss=loss, callbacks=[LossState(loss)], ...)

    Args:
        loss: one loss, or a dict of losses by dataset, as the trainer takes them.
    """

    def __init__(self, loss: nn.Module | dict[str, nn.Module]) -> None:
        self.losses = loss if isinstance(loss, dict) else {"loss": loss}
        for one in self.losses.values():
            for module in one.modules():
                if isinstance(module, ColumnLoss):
                    module.state_kept = True

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Those outside the model."""
        found: dict[str, nn.Parameter] = {}
        for key, one in self.losses.items():
            for prefix, module in one.named_modules():
                if isinstance(module, ColumnLoss):
                    own = module.named_parameters(recurse=False)
                    found |= {".".join(filter(None, (key, prefix, name))): p for name, p in own}
        return found

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save({name: p.detach().cpu() for name, p in self._parameters().items()}, folder / FILE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            return
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if not file.exists():
            raise FileNotFoundError(
                f"training resumes at step {state.global_step}, but {file} is missing: its checkpoint was saved "
                "without LossState, so the loss' trained numbers are lost. Without LossState training goes on with "
                "those given"
            )
        saved = torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(saved[name])
