"""Helpers that scripts take from ``deepspeed.runtime.utils``."""

from __future__ import annotations

import gc
import resource
import sys
from typing import Any

import torch

from shardwise import device as devices
from shardwise.deepspeed.utils.logging import logger
from shardwise.engine.clip import clip_grad_norm_
from shardwise.operations import rank_and_size
from shardwise.rng import set_seed
from shardwise.trees import map_tensors

__all__ = ["clip_grad_norm_", "empty_cache", "memory_usage", "move_to_device", "see_memory_usage", "set_random_seed"]


def memory_usage() -> dict[str, float]:
    """GiB of this process: ``device`` and ``device_peak`` (an accelerator's, else 0), ``host``, ``host_peak``."""
    device = devices.of_rank()
    here = devices.memory(device) if device.type != "cpu" else None
    peak = devices.peak_memory(device) if device.type != "cpu" else None
    used = 0 if here is None else here[1] - here[0]
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"device": used, "device_peak": peak or 0, "host": _resident(most), "host_peak": most}
    return {name: value / 2**30 for name, value in found.items()}


def _resident(otherwise: int) -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return otherwise


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log what memory this process uses, on rank 0.

    Args:
        message: what comes before the numbers.
        force: ``False``: does nothing, as in DeepSpeed.
    """
    if not force or rank_and_size()[0] != 0:
        return
    gc.collect()
    found = memory_usage()
    numbers = " | ".join(f"{name} {value:.2f} GiB" for name, value in found.items())
    logger.log(max(logger.getEffectiveLevel(), 20), f"{message} | {numbers}")


def empty_cache() -> None:
    """Give memory that torch's allocator keeps back to the device."""
    devices.empty_cache()


def set_random_seed(seed: int) -> None:
    """Seed Python, NumPy and torch, on this rank."""
    set_seed(seed)


def move_to_device(item: Any, device: torch.device | str, criterion_func: Any = None) -> Any:
    """The same nest with its tensors on a device."""
    return map_tensors(item, lambda t: t.to(device) if criterion_func is None or criterion_func(t) else t)
