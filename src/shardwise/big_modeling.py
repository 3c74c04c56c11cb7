"""What scripts import from ``accelerate.big_modeling``."""

from __future__ import annotations

from shardwise.inference.attaching import (
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    attach_execution_device_hook,
)
from shardwise.inference.auto_map import infer_auto_device_map
from shardwise.inference.casting import attach_layerwise_casting_hooks
from shardwise.inference.cpu_hook import cpu_offload_with_hook
from shardwise.inference.device_map import check_device_map
from shardwise.inference.dispatch import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from shardwise.inference.memory import get_balanced_memory, get_max_memory
from shardwise.inference.meta import init_empty_weights, init_on_device

__all__ = [
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
    "attach_layerwise_casting_hooks",
    "check_device_map",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "get_balanced_memory",
    "get_max_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
]
