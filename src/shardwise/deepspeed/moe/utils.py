"""``deepspeed.moe.utils``: what scripts ask about experts that are spread over ranks. Here there are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether a model has experts that are spread over ranks, and how many."""
    return False, 0


def is_moe_param(param: torch.Tensor) -> bool:
    """Whether a parameter belongs to such an expert."""
    return False


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | tuple[dict[str, Any], ...] | list[dict[str, Any]],
    max_group_size: int | float | None = None,
) -> list[dict[str, Any]]:
    """The parameter groups as they are, in a list."""
    return [param_groups] if isinstance(param_groups, dict) else list(param_groups)
