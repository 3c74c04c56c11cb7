"""Models that take turns on a device: each comes when it is called, and goes back when the next one is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise import operations
from shardwise.engine.uncompiled import uncompiled
from shardwise.inference.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

Device = torch.device | str | int


class CpuOffload(ModelHook):
    """The model is on the host until it is called; then it stays on its device.

    Args:
        execution_device: its device; by default this rank's.
        prev_module_hook: of the model before; that one goes back to the host when this one is called.

    Raises:
        DeviceError: it is not there.
    """

    def __init__(
        self, execution_device: Device | None = None, prev_module_hook: UserCpuOffloadHook | None = None
    ) -> None:
        self.execution_device = devices.of_rank() if execution_device is None else devices.named(execution_device)
        self.prev_module_hook = prev_module_hook

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to(devices.CPU)

    @uncompiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        before = self.prev_module_hook
        if isinstance(before, UserCpuOffloadHook) and _is_on(before.model) not in (None, devices.CPU):
            before.offload()
            devices.empty_cache()
        if _is_on(module) != self.execution_device:
            module.to(self.execution_device)
        sent: tuple[tuple[Any, ...], dict[str, Any]] = operations.to_device((args, kwargs), self.execution_device)
        return sent


def _is_on(module: nn.Module) -> torch.device | None:
    first = next(module.parameters(), None)
    return None if first is None else first.device


class UserCpuOffloadHook:
    """What the script keeps of a model with a :class:`CpuOffload`.

    Attributes:
        model: it.
        hook: its hook.
    """

    def __init__(self, model: nn.Module, hook: ModelHook) -> None:
        self.model, self.hook = model, hook

    def offload(self) -> None:
        """Send the model back to the host."""
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        """Take all hooks off the model, which stays where it is."""
        remove_hook_from_module(self.model)


def cpu_offload_with_hook(
    model: nn.Module, execution_device: Device | None = None, prev_module_hook: UserCpuOffloadHook | None = None
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Keep a model on the host until it is called, for pipelines of several that are called one after the other.

    Args:
        execution_device, prev_module_hook: as for :class:`CpuOffload`.

    Returns:
        The same model, and what sends it back to the host: ``offload()``.

    Raises:
        DeviceError: the device is not there.
    """
    hook = CpuOffload(execution_device, prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)
