"""Shardwise trains and runs PyTorch models that are too large for one device.

Names are imported when they are first used: the command line's ``--help`` does not wait for torch.
"""

# The first list is for type checkers and editors, the second for Python; a test compares them.
from __future__ import annotations

from typing import TYPE_CHECKING

from shardwise.lazy import importing

if TYPE_CHECKING:
    from shardwise import checkpoint, errors
    from shardwise.accelerator import Accelerator
    from shardwise.aliases import install_as
    from shardwise.comm import init
    from shardwise.compat.dataclasses import (
        AutocastKwargs,
        DataLoaderConfiguration,
        DDPCommunicationHookType,
        DistributedDataParallelKwargs,
        DistributedType,
        GradientAccumulationPlugin,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        ProfileKwargs,
        ProjectConfiguration,
    )
    from shardwise.compat.memory import find_executable_batch_size
    from shardwise.compat.plugins import DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from shardwise.data_loader import skip_first_batches
    from shardwise.engine.averaging import ema_update_
    from shardwise.engine.build import no_sync
    from shardwise.engine.clip import clip_grad_norm_, clip_grad_value_
    from shardwise.engine.elementwise import ELEMENTWISE
    from shardwise.engine.gathered import gathered
    from shardwise.engine.optimizer import attach, optimizer_state
    from shardwise.errors import ShardwiseError
    from shardwise.fsdp import DistributedDataParallel, FullyShardedDataParallel, fully_shard
    from shardwise.inference.auto_map import infer_auto_device_map
    from shardwise.inference.cpu_hook import cpu_offload_with_hook
    from shardwise.inference.dispatch import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
    from shardwise.inference.load import load
    from shardwise.inference.meta import init_empty_weights, init_on_device
    from shardwise.inference.to_int8 import quantize_checkpoint
    from shardwise.inference.uneven import together
    from shardwise.launchers import debug_launcher, notebook_launcher
    from shardwise.local_sgd import LocalSGD
    from shardwise.observe.memory import MemoryMeter, memory_meter
    from shardwise.observe.recording import record
    from shardwise.observe.stats import Stats, expected, reset_stats, stats
    from shardwise.plan.auto import planned_batch_size
    from shardwise.quantization.linear import QuantizedLinear
    from shardwise.quantization.others import as_plain_parameters
    from shardwise.quantization.replacing import quantize
    from shardwise.rng import set_seed, synchronize_rng_states
    from shardwise.state import PartialState
    from shardwise.strategy import Strategy

__version__ = "0.1.0"

_HOME = {
    "Accelerator": "accelerator",
    "AutocastKwargs": "compat.dataclasses",
    "DDPCommunicationHookType": "compat.dataclasses",
    "DataLoaderConfiguration": "compat.dataclasses",
    "DeepSpeedPlugin": "compat.plugins",
    "DistributedDataParallel": "fsdp",
    "DistributedDataParallelKwargs": "compat.dataclasses",
    "DistributedType": "compat.dataclasses",
    "ELEMENTWISE": "engine.elementwise",
    "FullyShardedDataParallel": "fsdp",
    "FullyShardedDataParallelPlugin": "compat.plugins",
    "GradScalerKwargs": "compat.dataclasses",
    "GradientAccumulationPlugin": "compat.dataclasses",
    "InitProcessGroupKwargs": "compat.dataclasses",
    "LocalSGD": "local_sgd",
    "MemoryMeter": "observe.memory",
    "PartialState": "state",
    "ProfileKwargs": "compat.dataclasses",
    "ProjectConfiguration": "compat.dataclasses",
    "QuantizedLinear": "quantization.linear",
    "ShardwiseError": "errors",
    "Stats": "observe.stats",
    "Strategy": "strategy",
    "as_plain_parameters": "quantization.others",
    "attach": "engine.optimizer",
    "clip_grad_norm_": "engine.clip",
    "clip_grad_value_": "engine.clip",
    "cpu_offload_with_hook": "inference.cpu_hook",
    "debug_launcher": "launchers",
    "ema_update_": "engine.averaging",
    "expected": "observe.stats",
    "find_executable_batch_size": "compat.memory",
    "fully_shard": "fsdp",
    "load": "inference.load",
    "load_checkpoint_and_dispatch": "inference.dispatch",
    "dispatch_model": "inference.dispatch",
    "disk_offload": "inference.dispatch",
    "cpu_offload": "inference.dispatch",
    "gathered": "engine.gathered",
    "infer_auto_device_map": "inference.auto_map",
    "init": "comm",
    "init_empty_weights": "inference.meta",
    "init_on_device": "inference.meta",
    "install_as": "aliases",
    "memory_meter": "observe.memory",
    "planned_batch_size": "plan.auto",
    "optimizer_state": "engine.optimizer",
    "no_sync": "engine.build",
    "notebook_launcher": "launchers",
    "quantize": "quantization.replacing",
    "quantize_checkpoint": "inference.to_int8",
    "record": "observe.recording",
    "reset_stats": "observe.stats",
    "set_seed": "rng",
    "skip_first_batches": "data_loader",
    "stats": "observe.stats",
    "synchronize_rng_states": "rng",
    "together": "inference.uneven",
}
_MODULES = ("checkpoint", "errors")
# Spelled out: type checkers take nothing else for the list of what is public.
__all__ = [
    "ELEMENTWISE",
    "Accelerator",
    "AutocastKwargs",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DistributedDataParallel",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "FullyShardedDataParallel",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "LocalSGD",
    "MemoryMeter",
    "PartialState",
    "ProfileKwargs",
    "ProjectConfiguration",
    "QuantizedLinear",
    "ShardwiseError",
    "Stats",
    "Strategy",
    "as_plain_parameters",
    "attach",
    "checkpoint",
    "clip_grad_norm_",
    "clip_grad_value_",
    "cpu_offload",
    "cpu_offload_with_hook",
    "debug_launcher",
    "disk_offload",
    "dispatch_model",
    "ema_update_",
    "errors",
    "expected",
    "find_executable_batch_size",
    "fully_shard",
    "gathered",
    "infer_auto_device_map",
    "init",
    "init_empty_weights",
    "init_on_device",
    "install_as",
    "load",
    "load_checkpoint_and_dispatch",
    "memory_meter",
    "no_sync",
    "notebook_launcher",
    "optimizer_state",
    "planned_batch_size",
    "quantize",
    "quantize_checkpoint",
    "record",
    "reset_stats",
    "set_seed",
    "skip_first_batches",
    "stats",
    "synchronize_rng_states",
    "together",
]

__getattr__ = importing(__name__, _HOME, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
