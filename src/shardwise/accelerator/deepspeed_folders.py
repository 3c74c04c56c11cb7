"""What ``load_state`` takes from a folder that DeepSpeed wrote, beside models and optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.deepspeed_folder import step_folder
from shardwise.checkpoint.directory import by_first
from shardwise.checkpoint.plain_values import Unknown, plain
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.torch_format import read_nest
from shardwise.comm import World

_SCHEDULER = "scheduler.bin"  # what accelerate writes beside the folder


def found_at(path: Path) -> Path | None:
    """One step's folder, if there is one of DeepSpeed at a path. Collective: rank 0 looks."""
    chosen = by_first(path, lambda given: step_folder(given) or "")
    return Path(chosen) if chosen else None


def scheduler_state(state: Mapping[str, Any], beside: Path) -> dict[str, Any] | None:
    """The scheduler's state in a folder, or in the file that accelerate writes beside it.

    Args:
        state: of a loaded folder.
        beside: the folder that ``load_state`` was given.

    Raises:
        CheckpointError: the file is damaged.
    """
    if state["scheduler"] is not None or not (beside / _SCHEDULER).is_file():
        return state["scheduler"]
    with StorageReader() as reader:
        try:
            return plain(read_nest(beside / _SCHEDULER), reader)
        except Unknown:
            return None


def take_loss_scale(scaler: torch.amp.GradScaler, saved: Mapping[str, Any] | None) -> None:
    """Let a scaler go on with the scale there was, and the steps since it last changed."""
    if saved is None:
        return
    since = int(saved.get("cur_iter", 0)) - int(saved.get("last_overflow_iter", -1)) - 1
    window = int(saved.get("scale_window", 0)) or max(since, 0) + 1
    state = {**scaler.state_dict(), "scale": float(saved["cur_scale"]), "_growth_tracker": max(since, 0) % window}
    scaler.load_state_dict(state)


def say_what_begins_anew(path: Path, what: Sequence[str]) -> None:
    """Warn on rank 0."""
    if what and World.current().rank == 0:
        warnings.warn(f"{path} was written by DeepSpeed and has no {', no '.join(what)}: they begin anew", stacklevel=4)
