"""What the parts of an Accelerator share: its attributes, typed, in one place."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardwise import operations
from shardwise.accelerator.led import Led
from shardwise.comm import World
from shardwise.compat.wrappers import extract_model_from_parallel
from shardwise.engine.state_dict import lend_values, needs_other_ranks
from shardwise.environment import stands_in_for
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

    _is_led = True  # see led.py
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
    def _as_accelerate(self) -> bool:
        """Is this for a script that counts on what Accelerate does, since ``import accelerate`` means Shardwise?"""
        return stands_in_for("accelerate")

    @property
    def _models(self) -> list[nn.Module]:
        return self._steps.models

    @property
    def _dataloaders(self) -> list[PreparedLoader]:
        return list(self._loaders)

    @property
    def _optimizers(self) -> list[AcceleratedOptimizer]:
        return self._steps.optimizers

    # --- what the main process does alone, and what all do -----------------------------------------
    def _follow(self) -> None:
        """From now on, this Accelerator's ranks do what its main process asks for."""
        if self._is_led and World.current().size > 1:
            me = weakref.ref(self)

            def perform(call: str, arguments: dict[str, Any]) -> None:
                accelerator = me()
                assert accelerator is not None
                if "model" in arguments:
                    arguments = {**arguments, "model": accelerator._models[arguments["model"]]}
                getattr(accelerator, call)(**arguments)

            self._steps.led = Led(self._steps, perform, self.strategy.timeout)

    def _together(self, call: str, arguments: dict[str, Any] | None = None) -> AbstractContextManager[None]:
        """Around what all ranks do: see :meth:`Led.together`."""
        if self._steps.led is not None:
            return self._steps.led.together(call, arguments)
        operations.meet(call, self.strategy.timeout)
        return nullcontext()

    def _apart(self, where: str) -> AbstractContextManager[None]:
        """Around hooks: see :meth:`Led.apart`."""
        return nullcontext() if self._steps.led is None else self._steps.led.apart(where)

    def _point(self, where: str) -> None:
        if self._steps.led is not None:
            self._steps.led.point(where)

    def _point_if_due(self, where: str) -> None:
        if self._steps.led is not None:
            self._steps.led.if_due(where)

    def _number_of(self, model: nn.Module) -> dict[str, Any] | None:
        """How other ranks are told which prepared model is meant."""
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        known = [extract_model_from_parallel(one, keep_torch_compile=False) for one in self._models]
        return next(({"model": i} for i, one in enumerate(known) if one is model), None)

    def _watch_state_dict(self, model: nn.Module) -> None:
        """The main process may read a prepared model's state dict alone, if the ranks have parts of it."""
        if self._steps.led is not None and needs_other_ranks(model):
            me = weakref.ref(self)

            def before(module: nn.Module, prefix: str, keep_vars: bool) -> None:
                accelerator = me()
                if accelerator is not None:
                    accelerator._before_state_dict(module)

            model.register_state_dict_pre_hook(before)

    def _before_state_dict(self, model: nn.Module) -> None:
        number, led = self._number_of(model), self._steps.led
        if number is not None and led is not None:
            led.before_state_dict(number)

    def _lend_values(self, model: nn.Module) -> None:
        lend_values(extract_model_from_parallel(model, keep_torch_compile=False))

    def wait_for_everyone(self) -> None:
        """Return when every rank is here. A collective."""
        self._point("wait_for_everyone")
        super().wait_for_everyone()
