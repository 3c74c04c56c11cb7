"""What scripts import from ``deepspeed.runtime``."""

from __future__ import annotations

from shardwise.lazy import importing

_MODULES = ("activation_checkpointing", "config", "dataloader", "engine", "lr_schedules", "utils", "zero")

__getattr__ = importing(__name__, {}, _MODULES)
