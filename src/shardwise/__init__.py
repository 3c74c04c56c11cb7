"""Shardwise trains and runs PyTorch models that are too large for one device.

Names are imported when they are first used: the command line's ``--help`` does not wait for torch.
"""

# ruff: noqa: F401  (the first list is for type checkers and editors, the second for Python; a test compares them)
from __future__ import annotations

from typing import TYPE_CHECKING

from shardwise.lazy import importing

if TYPE_CHECKING:
    from shardwise.accelerator import Accelerator
    from shardwise.comm import init
    from shardwise.data_loader import skip_first_batches
    from shardwise.engine.build import gathered, no_sync
    from shardwise.engine.clip import clip_grad_norm_, clip_grad_value_
    from shardwise.engine.elementwise import ELEMENTWISE
    from shardwise.engine.optimizer import attach, optimizer_state
    from shardwise.errors import ShardwiseError
    from shardwise.fsdp import DistributedDataParallel, FullyShardedDataParallel, fully_shard
    from shardwise.launchers import debug_launcher, notebook_launcher
    from shardwise.local_sgd import LocalSGD
    from shardwise.observe.memory import MemoryMeter, memory_meter
    from shardwise.observe.stats import Stats, expected, reset_stats, stats
    from shardwise.state import PartialState
    from shardwise.strategy import Strategy
    from shardwise.utils.dataclasses import (
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
    from shardwise.utils.memory import find_executable_batch_size
    from shardwise.utils.plugins import DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from shardwise.utils.random import set_seed, synchronize_rng_states

__version__ = "0.1.0"

_HOME = {
    "Accelerator": "accelerator",
    "AutocastKwargs": "utils.dataclasses",
    "DDPCommunicationHookType": "utils.dataclasses",
    "DataLoaderConfiguration": "utils.dataclasses",
    "DeepSpeedPlugin": "utils.plugins",
    "DistributedDataParallel": "fsdp",
    "DistributedDataParallelKwargs": "utils.dataclasses",
    "DistributedType": "utils.dataclasses",
    "ELEMENTWISE": "engine.elementwise",
    "FullyShardedDataParallel": "fsdp",
    "FullyShardedDataParallelPlugin": "utils.plugins",
    "GradScalerKwargs": "utils.dataclasses",
    "GradientAccumulationPlugin": "utils.dataclasses",
    "InitProcessGroupKwargs": "utils.dataclasses",
    "LocalSGD": "local_sgd",
    "MemoryMeter": "observe.memory",
    "PartialState": "state",
    "ProfileKwargs": "utils.dataclasses",
    "ProjectConfiguration": "utils.dataclasses",
    "ShardwiseError": "errors",
    "Stats": "observe.stats",
    "Strategy": "strategy",
    "attach": "engine.optimizer",
    "clip_grad_norm_": "engine.clip",
    "clip_grad_value_": "engine.clip",
    "debug_launcher": "launchers",
    "expected": "observe.stats",
    "find_executable_batch_size": "utils.memory",
    "fully_shard": "fsdp",
    "gathered": "engine.build",
    "init": "comm",
    "memory_meter": "observe.memory",
    "optimizer_state": "engine.optimizer",
    "no_sync": "engine.build",
    "notebook_launcher": "launchers",
    "reset_stats": "observe.stats",
    "set_seed": "utils.random",
    "skip_first_batches": "data_loader",
    "stats": "observe.stats",
    "synchronize_rng_states": "utils.random",
}
__all__ = [*_HOME]


__getattr__ = importing(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
