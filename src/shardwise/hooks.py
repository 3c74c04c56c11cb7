"""What scripts import from ``accelerate.hooks``."""

from __future__ import annotations

from shardwise.inference.align import AlignDevicesHook
from shardwise.inference.attaching import (
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    attach_execution_device_hook,
)
from shardwise.inference.casting import LayerwiseCastingHook
from shardwise.inference.cpu_hook import CpuOffload, UserCpuOffloadHook
from shardwise.inference.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "LayerwiseCastingHook",
    "ModelHook",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]
