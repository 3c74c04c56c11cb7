"""What the parts of an Accelerator share: its attributes, typed, in one place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardwise.state import AcceleratorState, GradientState, ProcessControl
from shardwise.strategy import Strategy

if TYPE_CHECKING:
    from shardwise.accelerator.loader_positions import KnownLoaders
    from shardwise.compat.dataclasses import (
        AutocastKwargs,
        DataLoaderConfiguration,
        ProfileKwargs,
        ProjectConfiguration,
    )
    from shardwise.data_loader import PreparedLoader
    from shardwise.observe.recording import Recording
    from shardwise.optimizer import AcceleratedOptimizer
    from shardwise.scheduler import AcceleratedScheduler
    from shardwise.stepping import Steps

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Base(ProcessControl):
    """The state of one Accelerator. Two of them share nothing but the process group."""

    strategy: Strategy
    mixed_precision: str
    state: AcceleratorState
    gradient_state: GradientState
    scaler: torch.amp.GradScaler | None
    device_placement: bool
    step_scheduler_with_optimizer: bool
    dataloader_config: DataLoaderConfiguration
    project_configuration: ProjectConfiguration
    autocast_handler: AutocastKwargs | None
    profile_handler: ProfileKwargs | None
    rng_types: list[str]
    step: int

    _steps: Steps
    _recording: Recording | None
    _units: Any
    _param_init_fn: Any
    _compile: dict[str, Any] | None
    _scheduler_per_process: bool
    _schedulers: list[AcceleratedScheduler]
    _loaders: KnownLoaders
    _custom_objects: list[Any]
    _save_hooks: OrderedDict[int, Callable[..., None]]
    _load_hooks: OrderedDict[int, Callable[..., None]]

    @property
    def _models(self) -> list[nn.Module]:
        return self._steps.models

    @property
    def _dataloaders(self) -> list[PreparedLoader]:
        return list(self._loaders)

    @property
    def _optimizers(self) -> list[AcceleratedOptimizer]:
        return self._steps.optimizers
