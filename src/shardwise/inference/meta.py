"""Models made without memory for their values, or on a device from the first."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from shardwise import device as devices
from shardwise.inference.parameters import on_device

_SETTING = "ACCELERATE_INIT_INCLUDE_BUFFERS"


class _Blocks(threading.local):
    """The open blocks of a thread, the innermost last: models that other threads make meanwhile are not concerned."""

    def __init__(self) -> None:
        self.open: list[_Block] = []


class _Block:
    """Where a block puts what modules register in it."""

    def __init__(self, device: torch.device, buffers: bool) -> None:
        self.device, self.buffers = device, buffers
        # A parameter that two modules register is one: found here, until the first of its kind is let go of.
        self.moved: Any = WeakIdKeyDictionary()

    def parameter(self, p: nn.Parameter) -> nn.Parameter:
        if p.device == self.device:
            return p
        found: nn.Parameter | None = self.moved.get(p)
        if found is None:
            found = self.moved[p] = on_device(p, self.device)
        return found


_blocks = _Blocks()


def _parameter(module: nn.Module, name: str, p: nn.Parameter) -> nn.Parameter | None:
    return _blocks.open[-1].parameter(p) if _blocks.open and p is not None else None


def _buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor | None:
    block = _blocks.open[-1] if _blocks.open else None
    return buffer.to(block.device) if block is not None and block.buffers and buffer is not None else None


@contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool | None = None) -> Iterator[None]:
    """A block in which the parameters of new modules are on ``device``.

    They keep their class, their attributes and whether they get gradients, and one that several modules share stays
    one. Blocks nest: the innermost one counts.

    Args:
        device: ``meta`` for shapes without values.
        include_buffers: buffers too, and every tensor that is made in the block without a device of its own. By
            default what ``ACCELERATE_INIT_INCLUDE_BUFFERS`` says, and else not.

    Raises:
        DeviceError: it is not there.
    """
    place = devices.named(device)
    if include_buffers is None:
        include_buffers = os.environ.get(_SETTING, "").lower() in ("1", "true", "yes", "y", "on", "t")
    with ExitStack() as stack:
        parameter: Any = _parameter
        buffer: Any = _buffer  # torch types them as if they returned nothing
        stack.callback(register_module_parameter_registration_hook(parameter).remove)
        if include_buffers:
            stack.callback(register_module_buffer_registration_hook(buffer).remove)
            stack.enter_context(place)
        block = _Block(place, include_buffers)
        _blocks.open.append(block)
        stack.callback(_blocks.open.remove, block)
        yield


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """A block in which new modules have parameters on ``meta``, which take no memory.

    So a model of any size can be made, to see its structure and sizes, and given values later.

    Args:
        include_buffers: as for :func:`init_on_device`. Buffers that a constructor computes are lost with it.
    """
    with init_on_device("meta", include_buffers=include_buffers):
        yield
