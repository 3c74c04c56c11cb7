"""Which ranks do what together. All of them hold different data, and none a part of a layer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from shardwise.errors import LeftOut
from shardwise.operations import rank_and_size


def _get_data_parallel_group() -> Any:
    """All ranks."""
    return dist.group.WORLD


def _get_data_parallel_world_size() -> int:
    return rank_and_size()[1]


def _get_data_parallel_rank() -> int:
    return rank_and_size()[0]


def _alone() -> int:
    """Of what is not split over ranks."""
    return 1


def _first() -> int:
    return 0


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
_get_sequence_data_parallel_group = _get_data_parallel_group
_get_sequence_data_parallel_world_size = _get_data_parallel_world_size
_get_sequence_data_parallel_rank = _get_data_parallel_rank
_get_model_parallel_world_size = get_model_parallel_world_size = _alone
get_tensor_model_parallel_world_size = _get_sequence_parallel_world_size = _alone
get_tensor_model_parallel_rank = get_model_parallel_rank = _get_sequence_parallel_rank = _first


def _get_max_expert_size() -> int:
    """No experts are split over ranks."""
    return 1


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Does nothing for ``ep_size=1``.

    Raises:
        LeftOut: experts would be split over ranks.
    """
    if ep_size != 1:
        raise LeftOut(
            f"ep_size={ep_size}: experts are not split over ranks",
            where="deepspeed.utils.groups.initialize",
            fix="use ep_size=1 with ZeRO stage 3, which splits every expert's parameters",
        )
