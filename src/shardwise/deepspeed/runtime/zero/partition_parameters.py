"""Names of ``deepspeed.zero``, where other libraries import them from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardwise.deepspeed.zero.external import register_external_parameter, unregister_external_parameter
from shardwise.deepspeed.zero.gathering import GatheredParameters
from shardwise.deepspeed.zero.init import Init, restore_init_context, shutdown_init_context
from shardwise.deepspeed.zero.status import DeepSpeedTensorOverride, ZeroParamStatus, ZeroParamType

__all__ = [
    "DeepSpeedTensorOverride",
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "register_external_parameter",
    "restore_init_context",
    "shutdown_init_context",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]
_orig_torch_arange = torch.arange  # transformers compares with it


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., Any], target_fp_dtype: torch.dtype | None = None, target_device: torch.device | None = None
) -> Callable[..., Any]:
    """``fn`` as it is. transformers puts another function in the place of this one while it builds a model.

    What it prevents by that, ``zero.Init`` here does not do: it leaves torch's functions alone.
    """
    return fn
