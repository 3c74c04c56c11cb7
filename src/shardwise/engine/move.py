"""Modules move to a device, and stay the objects that they are."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.engine.deferred import has_meta
from shardwise.engine.parked import parked_in
from shardwise.errors import UnitError, first_line


def move(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)``, by which every parameter stays the object that optimizers and others hold.

    Meta tensors stay where they are, and parameters whose values are put aside: these come to be where the model is
    sharded. Where torch cannot change a tensor's memory in place, as between the CPU and
    device types of plug-ins, ``to`` would replace parameters, and an optimizer would go on with those of before.

    Raises:
        UnitError: somebody holds the memory of a parameter, which then cannot move.
    """
    swap = torch.__future__.get_swap_module_params_on_conversion()
    changes = torch._has_compatible_shallow_copy_type(torch.empty(0), torch.empty(0, device=device))
    try:
        torch.__future__.set_swap_module_params_on_conversion(swap or not changes)
        if any(parked_in(p) is not None for p in module.parameters()):
            for inner in module.modules():
                if any(p is not None and parked_in(p) is not None for p in inner._parameters.values()):
                    _move_own(inner, device)
                else:
                    inner._apply(lambda t: t if t.is_meta else t.to(device), recurse=False)
        elif has_meta(module):
            module._apply(lambda t: t if t.is_meta else t.to(device))
        else:
            module.to(device)
    except RuntimeError as error:
        if "Couldn't swap" not in str(error):
            raise
        raise UnitError(
            f"a parameter cannot move to {device}: {first_line(error)}",
            where=type(module).__name__,
            fix=f"move the model to {device} before an optimizer or something else refers to its parameters",
        ) from error
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move what a module itself holds, without a look at what is put aside."""
    for p in module._parameters.values():
        if p is not None and parked_in(p) is None and not p.is_meta:
            p.data = p.data.to(device)
    for name, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[name] = buffer.to(device)
