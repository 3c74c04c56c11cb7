"""What a device map says: from names of modules to where their weights are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from shardwise import device as devices
from shardwise.comm import init
from shardwise.engine.build import members_of
from shardwise.engine.select import has_forward, select_units
from shardwise.engine.stored import StoredLayout, StoredTensor
from shardwise.errors import UnitError
from shardwise.inference.asked import as_classes
from shardwise.inference.device_map import DeviceMap, Place, within
from shardwise.inference.plan import DEVICE, DISK, HOST, Weights


def device_of(device_map: DeviceMap) -> torch.device:
    """The main device of a model with this map: the first that it names; the CPU if that is all it names.

    Raises:
        DeviceError: one that is not there.
    """
    named = [devices.named(at) for at in device_map.values() if at not in ("disk", "cpu")]
    if named:
        return named[0]
    if set(device_map.values()) == {"cpu"}:
        return torch.device("cpu")  # the map's own words: it runs there
    return init().device


def places_of(units: Sequence[str], device_map: DeviceMap, main: torch.device) -> dict[str, torch.device]:
    """On which device each unit runs: on its own, or, if its weights are elsewhere, on that of the unit before it.

    Args:
        units: by name, in the order in which they run.
        main: the device of the root, and of what comes before any that has its own.
    """
    out, last = {}, main
    for unit in units:
        at = _at(unit, device_map)
        if at is not None and at not in ("disk", "cpu"):
            last = devices.named(at)
        out[unit] = last
    return out


def units_of_map(
    module: nn.Module, device_map: DeviceMap, classes: Sequence[str] | str | None, *, apart: bool = False
) -> list[str]:
    """Names of units in the order in which they are registered; the root's, ``""``, comes first.

    Args:
        device_map: what it names is a unit of its own, also inside of another one.
        classes: names of classes that are units; default: repeated blocks, and what is as large.
        apart: small modules beside them (a norm) are units, too, and not the root's: they may be on another device.

    Raises:
        UnitError: the map, or ``classes``, names what there is not.
    """
    classes = as_classes(module, classes)
    rule = None if classes is None else lambda name, m: type(m).__name__ in classes
    found = {name for name, _ in select_units(module, rule)}
    modules = dict(module.named_modules())
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    known = modules.keys() | {name for name, _ in tensors}
    unknown = sorted(set(device_map) - known)
    if unknown:
        raise UnitError(
            f"device_map names what the model does not have: {', '.join(unknown[:5])}", fix="see named_modules()"
        )
    for name in device_map:
        owner = name if name in modules else name.rpartition(".")[0]
        if owner and has_forward(modules[owner]):
            found.add(owner)
    if apart:
        found |= set(_beside(module, "", found))
    return ["", *(name for name in modules if name in found)]


def _beside(module: nn.Module, name: str, units: Collection[str]) -> Iterator[str]:
    """The outermost modules with parameters that are in no unit, and have none inside."""
    for key, child in module.named_children():
        full = f"{name}.{key}" if name else key
        if full in units or next(child.parameters(), None) is None:
            continue
        if has_forward(child) and not any(unit.startswith(f"{full}.") for unit in units):
            yield full
        else:
            yield from _beside(child, full, units)


def weights_of(
    module: nn.Module, units: Sequence[str], tensors: Mapping[str, StoredTensor], parts: int = 1
) -> list[Weights]:
    """How much each unit has. A tied parameter belongs to the innermost unit that all its names are in.

    Args:
        parts: ranks that there are: buffers are as long as if all of them had a part.
    """
    of_unit = members_of(module.named_parameters(remove_duplicate=False), units)
    tables = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    told = getattr(module, "get_output_embeddings", None)
    head = getattr(told() if told is not None else None, "weight", None)
    share = _experts(module)
    out = []
    for name, its in of_unit.items():
        stored = [(names[0], tensors[names[0]]) for _, names in its]
        buffer = StoredLayout.plan(stored, parts).layout.numel if stored else 0
        each = last = 0.0
        for p, names in its:
            if p is head:
                last += p.numel()
            elif p.ndim > 1 and not tables.issuperset(names):  # of a table, rows are taken
                each += p.numel() * share.get(p.shape[0], 1.0) ** (p.ndim > 2)
        out.append(Weights(name, sum(t.nbytes for _, t in stored), buffer, each, last))
    return out


def _experts(module: nn.Module) -> dict[int, float]:
    """The part of its experts that a token is sent to, by how many there are, as the model's configuration says."""
    config = getattr(module, "config", None)
    config = getattr(config, "text_config", None) or config
    used = getattr(config, "num_experts_per_tok", None)
    counts = (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    return {n: used / n for n in counts if isinstance(n, int) and isinstance(used, int) and n}


def home_of(unit: str, device_map: DeviceMap, device: torch.device) -> str:
    """Where a map wants the weights of a unit that runs on a device.

    Raises:
        UnitError: it has no place for them.
    """
    at = _at(unit, device_map)
    if at is None:
        raise UnitError(f"device_map has no place for '{unit or '(root)'}'", fix="add an entry for it, or for ''")
    if at == "disk":
        return DISK
    return HOST if at == "cpu" and device.type != "cpu" else DEVICE


def _at(unit: str, device_map: DeviceMap) -> Place | None:
    best = max((key for key in device_map if within(unit, key)), key=len, default=None)
    if best is not None:
        return device_map[best]
    # Only what is in it has places: its own parameters, or its children. As the first of these.
    return next((at for key, at in device_map.items() if within(key, unit)), None)
