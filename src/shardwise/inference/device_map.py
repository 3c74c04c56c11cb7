"""Device maps: which part of a model goes where, by the names of modules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from shardwise.errors import PlacementError
from shardwise.inference.tensors import get_non_persistent_buffers

Place = int | str | torch.device
"""A number of an accelerator, ``cpu``, ``disk``, or a device."""
DeviceMap = Mapping[str, Place]
"""By name of a module or parameter; ``""`` is the rest."""


def within(name: str, module: str) -> bool:
    """Is a name the module's own, or below it? ``h.1`` is not above ``h.10``."""
    return not module or name == module or name.startswith(f"{module}.")


def place_of(name: str, device_map: Mapping[str, Place]) -> Place:
    """Where a map puts a tensor or module: what it says of it, or else of the nearest module around it.

    Raises:
        PlacementError: nothing.
    """
    found = name
    while found not in device_map:
        if not found:
            raise PlacementError(
                f"'{name}' has no device", where="device_map", fix="name it or a module around it, or '' for the model"
            )
        found = found.rpartition(".")[0]
    return device_map[found]


def clean_device_map(device_map: dict[str, Place], module_name: str = "") -> dict[str, Place]:
    """The same map in as few words as it takes: modules whose parts are all in one place are named instead of these.

    Args:
        device_map: changed in place.
        module_name: look below this module alone.

    Returns:
        ``device_map``.
    """
    below = [name for name in device_map if within(name, module_name)]
    places = {device_map[name] for name in below}
    if len(below) > 1 and len(places) == 1:
        kept = [(name if name != below[0] else module_name, place) for name, place in device_map.items()]
        gone = set(below[1:])
        device_map.clear()
        device_map.update((name, place) for name, place in kept if name not in gone or name == module_name)
        return device_map
    depth = module_name.count(".") + 2 if module_name else 1
    children = {".".join(name.split(".")[:depth]): None for name in below if name != module_name}
    for child in children:
        clean_device_map(device_map, child)
    return device_map


def check_device_map(model: nn.Module, device_map: Mapping[str, Place]) -> None:
    """Is there a device for every parameter, and for every buffer that state dicts have?

    Warns of names that are not the model's.

    Raises:
        PlacementError: not for all; names those that are left.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    passing = get_non_persistent_buffers(model, recurse=True, fqns=True)
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    unknown = [name for name in device_map if name not in modules and name not in {*tensors, *buffers}]
    if unknown:
        warnings.warn(
            f"these device_map keys do not match any submodules or tensors of the model: {unknown}",
            UserWarning,
            stacklevel=2,
        )
    left = []
    for name in [*tensors, *(name for name in buffers if name not in passing)]:
        parts = name.split(".")
        if not any(".".join(parts[:i]) in device_map for i in range(len(parts) + 1)):
            left.append(name)
    if left:
        raise PlacementError(
            f"no device for {', '.join(left)}", where="device_map", fix="name them, or a module around them"
        )
