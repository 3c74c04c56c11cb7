"""The tensors of a module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from shardwise.errors import PlacementError


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the parameters and buffers.

    Args:
        include_buffers: buffers too.
        recurse: those of the submodules too.
        remove_non_persistent: not the buffers that are left out of state dicts.
    """
    yield from module.named_parameters(recurse=recurse)
    if not include_buffers:
        return
    passing = get_non_persistent_buffers(module, recurse, fqns=True) if remove_non_persistent else set()
    for name, buffer in module.named_buffers(recurse=recurse):
        if name not in passing:
            yield name, buffer


def get_non_persistent_buffers(module: nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """Names of the buffers that are left out of state dicts.

    Args:
        recurse: those of the submodules too.
        fqns: with the path to the module that has it, else the last part of the name alone.
    """
    parts = module.named_modules(remove_duplicate=False) if recurse else [("", module)]
    return {
        f"{prefix}.{name}" if prefix and fqns else name
        for prefix, part in parts
        for name in part._non_persistent_buffers_set
    }


def owner_of(module: nn.Module, tensor_name: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and its last name there.

    Raises:
        PlacementError: no parameter and no buffer has that name.
    """
    path, _, last = tensor_name.rpartition(".")
    owner = module
    for step in path.split(".") if path else ():
        found = getattr(owner, step, None)
        if not isinstance(found, nn.Module):
            raise _missing(module, tensor_name)
        owner = found
    if owner._parameters.get(last) is None and owner._buffers.get(last) is None:
        raise _missing(module, tensor_name)
    return owner, last


def _missing(module: nn.Module, name: str) -> PlacementError:
    return PlacementError(
        f"has no parameter or buffer '{name}'",
        where=type(module).__name__,
        fix="see named_parameters and named_buffers",
    )


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What tensors on one storage have in common: device, address and bytes. All on ``meta`` have the address 0."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()
