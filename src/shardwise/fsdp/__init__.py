"""``fully_shard``, and drop-ins for torch's own wrappers: change the import, keep the script.

``from shardwise.fsdp import ...`` has every name that scripts import from ``torch.distributed.fsdp``: those that do
something are Shardwise's, the policies and enumerations are torch's own objects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwise.fsdp.fsdp1 import FullyShardedDataParallel
from shardwise.fsdp.modules import FSDPModule, UnshardHandle, fully_shard, register_fsdp_forward_method
from shardwise.fsdp.wrappers import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.fsdp import (
        BackwardPrefetch,
        CPUOffload,
        CPUOffloadPolicy,
        FullOptimStateDictConfig,
        FullStateDictConfig,
        LocalOptimStateDictConfig,
        LocalStateDictConfig,
        MixedPrecision,
        MixedPrecisionPolicy,
        OffloadPolicy,
        OptimStateDictConfig,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        ShardingStrategy,
        StateDictConfig,
        StateDictSettings,
        StateDictType,
    )

__all__ = [
    "BackwardPrefetch",
    "CPUOffload",
    "CPUOffloadPolicy",
    "DistributedDataParallel",
    "FSDPModule",
    "FullOptimStateDictConfig",
    "FullStateDictConfig",
    "FullyShardedDataParallel",
    "LocalOptimStateDictConfig",
    "LocalStateDictConfig",
    "MixedPrecision",
    "MixedPrecisionPolicy",
    "OffloadPolicy",
    "OptimStateDictConfig",
    "ShardedOptimStateDictConfig",
    "ShardedStateDictConfig",
    "ShardingStrategy",
    "StateDictConfig",
    "StateDictSettings",
    "StateDictType",
    "UnshardHandle",
    "fully_shard",
    "register_fsdp_forward_method",
]


def __getattr__(name: str) -> Any:
    """Torch's own objects, imported when they are asked for: that takes most of a second."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import torch.distributed.fsdp

    return getattr(torch.distributed.fsdp, name)
