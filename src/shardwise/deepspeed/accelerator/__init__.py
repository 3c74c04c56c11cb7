"""``get_accelerator()``: what this process computes on, in DeepSpeed's words."""

from shardwise.deepspeed.accelerator.real_accelerator import (
    Accelerator,
    get_accelerator,
    is_current_accelerator_supported,
)

__all__ = ["Accelerator", "get_accelerator", "is_current_accelerator_supported"]
