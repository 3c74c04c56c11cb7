"""The names of ``deepspeed.zero``, where other libraries import them from, and some that they look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardwise.deepspeed import zero

_orig_torch_arange = torch.arange  # transformers compares with it
partitioned_param_data_shape = [0]
"""What DeepSpeed shows as the shape of a parameter whose values are away. Here a parameter keeps its own."""


def __getattr__(name: str) -> Any:
    return getattr(zero, name)


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., Any], target_fp_dtype: torch.dtype | None = None, target_device: torch.device | None = None
) -> Callable[..., Any]:
    """``fn`` as it is. transformers puts another function in the place of this one while it builds a model.

    What it prevents by that, ``zero.Init`` here does not do: it leaves torch's functions alone.
    """
    return fn
