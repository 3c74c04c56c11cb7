"""``deepspeed.checkpointing``: a part of a forward that is computed again in backward, over torch's own function.

What such a part is called with may be kept on the host until then, as ``activation_offload=cpu`` keeps it. Nothing is
split over ranks here, so what DeepSpeed has for that has no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import checkpoint as _torch

from shardwise.deepspeed.utils.logging import warning_once
from shardwise.deepspeed.utils.rng_tracker import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from shardwise.deepspeed_config import load_ds_config, read_ds_config
from shardwise.tiers.ledger import Ledger
from shardwise.tiers.saved_tensors import SavedOnHost

__all__ = [
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "non_reentrant_checkpoint",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]


@dataclass
class _Settings:
    configured: bool = False
    on_host: bool = False


_settings = _Settings()
_hosts: dict[torch.device, SavedOnHost] = {}


class _Nothing:
    """No tensors that have a way of their own to backward."""

    def pack(self, tensor: torch.Tensor) -> Any:
        return None

    def unpack(self, packed: Any) -> torch.Tensor:
        raise AssertionError("nothing was packed")


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Choose what :func:`checkpoint` does.

    Args:
        deepspeed_config: whose ``activation_checkpointing.cpu_checkpointing`` counts.
        checkpoint_in_cpu: the same, said here, which wins: keep what a part is called with on the host.
        mpu_, partition_activations, contiguous_checkpointing, num_checkpoints, synchronize, profile: no effect; the
            second and the third are said so about if they are on.
    """
    _settings.configured, _settings.on_host = True, False
    if deepspeed_config is not None:
        _settings.on_host = read_ds_config(*load_ds_config(deepspeed_config)).offload_activations == "cpu"
    if checkpoint_in_cpu is not None:
        _settings.on_host = checkpoint_in_cpu
    idle = {"partition_activations": partition_activations, "contiguous_checkpointing": contiguous_checkpointing}
    if on := [name for name, value in idle.items() if value]:
        warning_once(f"checkpointing.configure: no effect here, where no layer is split over ranks: {', '.join(on)}")


def is_configured() -> bool:
    """Has :func:`configure` been called?"""
    return _settings.configured


def reset() -> None:
    """Forget what is kept for backwards that will not come."""
    _hosts.clear()


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, which backward computes again, with the same random numbers.

    Keeps the arguments, and nothing that is computed in between.
    """
    on_host = _on_host((args, kwargs)) if _settings.on_host and torch.is_grad_enabled() else nullcontext()
    with on_host:
        return _torch.checkpoint(function, *args, use_reentrant=False, **kwargs)


non_reentrant_checkpoint = checkpoint


def _on_host(given: Any) -> Any:
    found = next((t.device for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, torch.Tensor)), None)
    if found is None:
        return nullcontext()
    if found not in _hosts:
        _hosts[found] = SavedOnHost(found, Ledger(), _Nothing())
    return _hosts[found].hooks()


def set_num_layers(nlayers: int) -> None:
    """No effect: only what is split over ranks needs it."""


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """No effect, and said so if it is on: no layer is split over ranks."""
    if partition_activation:
        warning_once("partition_activations has no effect here, where no layer is split over ranks")
