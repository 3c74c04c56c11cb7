"""The part of a Trainer that saves and loads: weights as transformers has them, optimizer state in parts."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_pt_utils import reissue_pt_warnings
from transformers.trainer_utils import _is_peft_model

from shardwise import checkpoint
from shardwise.checkpoint.coordination import CollectiveBlock
from shardwise.errors import CheckpointError
from shardwise.transformers.subclasses import loaded_in_parts, overrides, saved_in_parts

OPTIMIZER = "optimizer"  # the folder in a checkpoint


class Saving:
    """Every rank calls each of these: what a strategy splits, no rank has alone."""

    args: Any
    model: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    # --- saving --------------------------------------------------------------------------------
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what ``from_pretrained`` reads: whole weights, or a peft model's adapters. A collective.

        Cost: under ``zero3`` rank 0 has a copy of all that is written, in host memory.
        """
        trainer: Any = self
        folder = output_dir if output_dir is not None else self.args.output_dir
        state_dict = self.accelerator.get_state_dict(self.model)
        with saved_in_parts(self), CollectiveBlock(f"save_model('{folder}')", slow=True):
            trainer._save(folder, state_dict=state_dict)
        if self.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoint.save(
            Path(output_dir) / OPTIMIZER,
            models=[self.model],
            excluded=[self.model],
            optimizers=[self.optimizer.optimizer],
            info={"step": self.state.global_step},
            progress=False,
        )
        if self.args.should_save:
            with warnings.catch_warnings(record=True) as caught:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
            reissue_pt_warnings(caught)

    # --- loading -------------------------------------------------------------------------------
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if overrides(self, "_load_from_checkpoint"):
            super()._load_from_checkpoint(resume_from_checkpoint)  # type: ignore[misc]
        elif _is_peft_model(model):
            with loaded_in_parts(model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            checkpoint.load_model(model, resume_from_checkpoint, progress=False)

    def _load_best_model(self) -> None:
        if overrides(self, "_load_best_model") or _is_peft_model(self.model):
            with loaded_in_parts(self.model):
                super()._load_best_model()  # type: ignore[misc]
        else:
            checkpoint.load_model(self.model, self.state.best_model_checkpoint, progress=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        _load_optimizer(Path(checkpoint), self.model, self.optimizer.optimizer)
        schedule = Path(checkpoint) / SCHEDULER_NAME
        if schedule.is_file():
            with warnings.catch_warnings(record=True) as caught:
                self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))
            reissue_pt_warnings(caught)


def _load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    path = folder / OPTIMIZER
    if not path.is_dir():
        if any((folder / name).exists() for name in ("optimizer.pt", "optimizer.bin")):
            raise CheckpointError(
                "its optimizer state was not written by Shardwise",
                where=str(folder),
                fix="go on with the weights alone: load them with from_pretrained and train() without "
                "resume_from_checkpoint",
            )
        return  # save_only_model
    checkpoint.load(path, models=[model], excluded=[model], optimizers=[optimizer], progress=False)
