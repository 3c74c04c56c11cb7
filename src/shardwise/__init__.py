"""Shardwise trains and runs PyTorch models that are too large for one device."""

from shardwise.accelerator import Accelerator
from shardwise.comm import init
from shardwise.engine.build import gathered, no_sync
from shardwise.engine.clip import clip_grad_norm_, clip_grad_value_
from shardwise.engine.optimizer import attach
from shardwise.errors import ShardwiseError
from shardwise.fsdp import DistributedDataParallel, FullyShardedDataParallel, fully_shard
from shardwise.observe.memory import MemoryMeter, memory_meter
from shardwise.observe.stats import Stats, expected, reset_stats, stats
from shardwise.strategy import Strategy

__version__ = "0.1.0"
__all__ = [
    "Accelerator",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "MemoryMeter",
    "ShardwiseError",
    "Stats",
    "Strategy",
    "attach",
    "clip_grad_norm_",
    "clip_grad_value_",
    "expected",
    "fully_shard",
    "gathered",
    "init",
    "memory_meter",
    "no_sync",
    "reset_stats",
    "stats",
]
