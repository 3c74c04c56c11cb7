"""What a device map says: from names of modules to where their weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from shardwise import device as devices
from shardwise.comm import init
from shardwise.engine.build import members_of
from shardwise.engine.select import has_forward, select_units
from shardwise.engine.stored import StoredTensor
from shardwise.errors import UnitError
from shardwise.inference.device_map import DeviceMap, within
from shardwise.inference.plan import DEVICE, DISK, HOST, Weights


def device_of(device_map: DeviceMap) -> torch.device:
    """Where a model with this map runs: on the device that it names; on the CPU if that is all it names.

    Raises:
        UnitError: it names several devices.
        DeviceError: one that is not there.
    """
    named = {devices.named(at) for at in device_map.values() if at not in ("disk", "cpu")}
    if len(named) > 1:
        raise UnitError(
            f"the map names several devices: {', '.join(sorted(map(str, named)))}",
            fix="one device per rank for now; 'cpu' and 'disk' beside it",
        )
    if named:
        return named.pop()
    if set(device_map.values()) == {"cpu"}:
        return torch.device("cpu")  # the map's own words: it runs there
    return init().device


def units_of_map(module: nn.Module, device_map: DeviceMap, classes: Sequence[str] | None) -> list[str]:
    """Names of units in the order in which they are registered; the root's, ``""``, comes first.

    Args:
        device_map: what it names is a unit of its own, also inside of another one.
        classes: names of classes that are units; default: repeated blocks, and what is as large.

    Raises:
        UnitError: the map, or ``classes``, names what there is not.
    """
    rule = None if classes is None else lambda name, m: type(m).__name__ in classes
    found = {name for name, _ in select_units(module, rule)}
    modules = dict(module.named_modules())
    known = modules.keys() | {name for name, _ in module.named_parameters(remove_duplicate=False)}
    unknown = sorted(set(device_map) - known)
    if unknown:
        raise UnitError(
            f"device_map names what the model does not have: {', '.join(unknown[:5])}", fix="see named_modules()"
        )
    for name in device_map:
        owner = name if name in modules else name.rpartition(".")[0]
        if owner and has_forward(modules[owner]):
            found.add(owner)
    return ["", *(name for name in modules if name in found)]


def weights_of(module: nn.Module, units: Sequence[str], tensors: Mapping[str, StoredTensor]) -> list[Weights]:
    """How much each unit has. A tied parameter belongs to the innermost unit that all its names are in."""
    of_unit = members_of(module.named_parameters(remove_duplicate=False), units)
    return [Weights(name, sum(tensors[names[0]].nbytes for _, names in its)) for name, its in of_unit.items()]


def home_of(unit: str, device_map: DeviceMap, device: torch.device) -> str:
    """Where a map wants the weights of a unit.

    Raises:
        UnitError: it has no place for them.
    """
    best = max((key for key in device_map if within(unit, key)), key=len, default=None)
    at = None if best is None else device_map[best]
    if at is None and not unit:  # the root's own parameters: as the first of its children
        at = next((found for key, found in device_map.items() if "." not in key), None)
    if at is None:
        raise UnitError(f"device_map has no place for '{unit or '(root)'}'", fix="add an entry for it, or for ''")
    if at == "disk":
        return DISK
    return HOST if at == "cpu" and device.type != "cpu" else DEVICE
