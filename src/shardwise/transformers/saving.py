"""The part of a Trainer that saves and loads: weights as transformers has them, optimizer state in parts."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import reissue_pt_warnings
from transformers.trainer_utils import _is_peft_model
from transformers.utils import CONFIG_NAME

from shardwise import checkpoint
from shardwise.checkpoint.coordination import CollectiveBlock
from shardwise.checkpoint.small_state import why_refused
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
            dtype = next((v.dtype for v in state_dict.values() if torch.is_tensor(v) and v.is_floating_point()), None)
            trainer._save(folder, state_dict=state_dict)  # which empties it
            if self.args.should_save:
                _write_true_dtype(self.model, dtype, folder)
        if self.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoint.save(
            Path(output_dir) / OPTIMIZER,
            models=[self.model],
            excluded=[self.model],
            optimizers=[self.optimizer.optimizer],
            info={"step": self.state.global_step, "samples": self._samples_per_step()},
            progress=False,
        )
        if self.args.should_save:
            with warnings.catch_warnings(record=True) as caught:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
            reissue_pt_warnings(caught)

    def _samples_per_step(self) -> int:
        """Of all ranks and micro-batches."""
        trainer: Any = self
        return int(trainer.get_total_train_batch_size(self.args))

    # --- loading -------------------------------------------------------------------------------
    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> Any:
        """The Trainer finds its place in the data by the number of steps: each has to have as many samples as before.

        Raises:
            CheckpointError: they have others now.
        """
        folder = None if resume_from_checkpoint is None else Path(resume_from_checkpoint) / OPTIMIZER
        if folder is not None and folder.is_dir() and not self.args.ignore_data_skip:
            before, now = checkpoint.read_manifest(folder).info.get("samples"), self._samples_per_step()
            if before not in (None, now):
                raise CheckpointError(
                    f"its steps had {before} samples, and those of this run have {now}: the place in the data is lost",
                    where=str(resume_from_checkpoint),
                    fix=f"choose per_device_train_batch_size and gradient_accumulation_steps so that all ranks have "
                    f"{before} together, or ignore_data_skip=True to begin the epoch anew",
                )
        return super()._init_training_state(  # type: ignore[misc]
            max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if overrides(self, "_load_from_checkpoint"):
            super()._load_from_checkpoint(resume_from_checkpoint)  # type: ignore[misc]
        elif _is_peft_model(model):
            with loaded_in_parts(model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        elif _by_deepspeed(Path(resume_from_checkpoint)):  # its master values, where other files have them in 16 bits
            checkpoint.load(resume_from_checkpoint, models=[model], optimizers=None, progress=False)
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
        state = _load_optimizer(Path(checkpoint), self.model, self.optimizer.optimizer)
        schedule = Path(checkpoint) / SCHEDULER_NAME
        if schedule.is_file():
            with warnings.catch_warnings(record=True) as caught:
                state = torch.load(schedule, weights_only=True)
            reissue_pt_warnings(caught)
        if state is not None:
            self.lr_scheduler.load_state_dict(state)


def _write_true_dtype(model: Any, written: torch.dtype | None, folder: str) -> None:
    """Parameters are shown in the dtype that computes; what was written is the master values, in theirs.

    ``config.json`` says in which dtype ``from_pretrained`` gives them back.
    """
    config: Any = getattr(model, "config", None)
    if written in (None, getattr(model, "dtype", written)) or not (Path(folder) / CONFIG_NAME).is_file():
        return
    config.dtype = str(written).removeprefix("torch.")
    config.save_pretrained(folder)


def _by_deepspeed(folder: Path) -> bool:
    """A Trainer with ``deepspeed=`` has DeepSpeed write, too: ``latest``, and a folder that it names."""
    return (folder / "latest").is_file()


def _load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """From a checkpoint of this Trainer, of a plain one, or of one with DeepSpeed. A collective.

    Returns:
        The scheduler's state, if DeepSpeed had it.
    """
    path = folder / OPTIMIZER
    if path.is_dir():
        checkpoint.load(path, models=[model], excluded=[model], optimizers=[optimizer], progress=False)
    elif _by_deepspeed(folder):
        loaded = checkpoint.load(folder, models=[model], excluded=[model], optimizers=[optimizer], progress=False)
        return loaded.state["scheduler"]
    elif (folder / OPTIMIZER_NAME).is_file():
        with CollectiveBlock(f"loading {folder / OPTIMIZER_NAME}", slow=True):
            checkpoint.load_full_optimizer_state(optimizer, _whole_state(folder / OPTIMIZER_NAME))
    elif others := sorted(found.name for found in folder.glob("*optimizer*")):
        raise CheckpointError(
            f"its optimizer state, '{others[0]}', was written by neither Shardwise, DeepSpeed nor a plain Trainer",
            where=str(folder),
            fix="go on with the weights alone: load them with from_pretrained and train() without "
            "resume_from_checkpoint",
        )
    return None  # save_only_model, if there is nothing


def _whole_state(path: Path) -> dict[str, Any]:
    """Of ``torch.save``. Values stay in the file until a rank takes its part of them."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"cannot be read: {why_refused(error)}",
            where=str(path),
            fix="take another checkpoint: this file is not whole, or torch.save() did not write it",
        ) from error
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise CheckpointError("is no optimizer's state dict", where=str(path), fix="take another checkpoint")
    return state
