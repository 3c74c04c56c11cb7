"""``OnDevice``: models that are made on a device, in a dtype."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from shardwise import device as devices
from shardwise.inference.meta import init_on_device


class OnDevice:
    """A block in which new modules and tensors are on a device, and floating-point ones have a dtype.

    A model on ``meta`` has no values; ``initialize`` and ``fully_shard`` give it some, one unit at a time.

    Args:
        dtype: of floating-point tensors that are made without one of their own.
        device: of all that are made without one.
        enabled: ``False``: the block does nothing.

    Raises:
        DeviceError: it is not there.
    """

    def __init__(self, dtype: torch.dtype | None, device: str | torch.device = "meta", enabled: bool = True) -> None:
        self.dtype, self.enabled, self.device = dtype, enabled, device
        self._place = devices.named(device) if enabled else None
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        if self._place is None:
            return
        stack = ExitStack()
        if self.dtype is not None and self.dtype.is_floating_point:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
        stack.enter_context(init_on_device(self._place, include_buffers=True))
        self._open.append(stack)

    def __exit__(self, *error: Any) -> None:
        if self._open:
            self._open.pop().close()
