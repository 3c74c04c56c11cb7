"""``deepspeed.comm``: the process group, and collectives of ``torch.distributed`` under the names that scripts use.

A process that no launcher started is a world of one rank, in which all of them work.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import (
    ReduceOp,
    all_gather,
    all_gather_object,
    all_reduce,
    all_to_all,
    all_to_all_single,
    barrier,
    broadcast,
    broadcast_object_list,
    destroy_process_group,
    gather,
    irecv,
    is_available,
    is_initialized,
    isend,
    monitored_barrier,
    recv,
    reduce,
    reduce_scatter,
    reduce_scatter_tensor,
    scatter,
    send,
)

from shardwise import comm
from shardwise import device as devices
from shardwise.comm.world import default_device
from shardwise.environment import local_rank
from shardwise.errors import CommError

__all__ = [
    "ReduceOp", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "allgather_fn", "barrier", "broadcast", "broadcast_object_list", "destroy_process_group",
    "gather", "get_all_ranks_from_group", "get_global_rank", "get_local_rank", "get_rank", "get_world_group",
    "get_world_size", "inference_all_reduce", "init_distributed", "irecv", "is_available", "is_initialized", "isend",
    "monitored_barrier", "new_group", "recv", "reduce", "reduce_scatter", "reduce_scatter_fn",
    "reduce_scatter_tensor", "scatter", "send",
]  # fmt: skip

_TIMEOUT = 600.0  # seconds
inference_all_reduce = all_reduce
reduce_scatter_fn = reduce_scatter_tensor


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | float | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the process group that the launcher prepared. A second call does nothing.

    A process alone gets a group of one rank.

    Args:
        dist_backend: ``nccl``, ``gloo``, ...; by default what this rank's device speaks.
        distributed_port: where the ranks meet, if the launcher did not say.
        timeout: how long a collective may take; ten minutes by default (or ``DEEPSPEED_TIMEOUT`` minutes).
        init_method, rank, world_size: as for ``torch.distributed.init_process_group``.
        dist_init_required: ``False``: it has to be there already.
        auto_mpi_discovery, verbose, config: accepted, without effect.

    Raises:
        CommError: the ranks did not find each other, or ``dist_init_required=False`` and there is no process group.
        DeviceError: this rank's device is not there.
    """
    if dist_init_required is False and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommError(
            "dist_init_required=False, and there is no process group yet",
            fix="call init_distributed() first, or leave dist_init_required out",
        )
    seconds = _seconds(timeout)
    if init_method is not None and not dist.is_initialized():
        dist.init_process_group(
            dist_backend or devices.backend(default_device(), max(world_size, 1)),
            init_method=init_method, rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds),
        )  # fmt: skip
    os.environ.setdefault("MASTER_PORT", str(distributed_port))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist_backend is not None and not dist.is_initialized():
        dist.init_process_group(dist_backend, timeout=timedelta(seconds=seconds))
    device = comm.init(timeout=seconds).device
    if not dist.is_initialized():
        dist.init_process_group(
            dist_backend or devices.backend(device, 1), store=dist.HashStore(), rank=0, world_size=1
        )
        comm.init(device, timeout=seconds)


def _seconds(timeout: timedelta | float | None) -> float:
    if timeout is None:
        return 60.0 * float(os.environ["DEEPSPEED_TIMEOUT"]) if "DEEPSPEED_TIMEOUT" in os.environ else _TIMEOUT
    return timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)


def all_gather_into_tensor(output_tensor: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
    """Every rank's ``tensor`` end to end, in the order of ranks; a number counts as a tensor of one element."""
    given = tensor.reshape(1) if tensor.dim() == 0 else tensor
    return dist.all_gather_into_tensor(output_tensor, given, group=group, async_op=async_op)


allgather_fn = all_gather_into_tensor


def get_rank(group: Any = None) -> int:
    """This rank; 0 where nobody has initialised anything."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """This rank's number on its host."""
    return local_rank()


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    """Which rank of all is number ``group_rank`` of a group."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_world_group() -> Any:
    return dist.group.WORLD


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    return list(range(get_world_size())) if group is None else dist.get_process_group_ranks(group)


def new_group(ranks: list[int]) -> Any:
    return dist.new_group(ranks)
