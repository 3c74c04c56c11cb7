"""What a caller asks for when a model is loaded, in one form, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise.errors import OffloadError, UnitError
from shardwise.inference.device_map import DeviceMap, within

Asked = str | int | torch.device | Mapping[str, int | str | torch.device] | None
MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "split")


def as_map(asked: Asked) -> str | DeviceMap:
    """One of :data:`MAPS`, or a map by names of modules.

    Args:
        asked: that; or one place for all of the model: ``"disk"``, ``"cpu"``, a device or its number; ``None``: where
            this rank computes.

    Raises:
        UnitError: none of these.
        DeviceError: a device that is not there.
    """
    if isinstance(asked, str) and asked in MAPS:
        return asked
    if asked is None:
        return {"": devices.of_rank()}
    found = asked if isinstance(asked, Mapping) else {"": asked}
    for name, place in found.items():
        if not isinstance(name, str):
            raise UnitError(f"device_map has the key {name!r}", fix="names of modules, and '' for the rest")
        if not _is_place(place):
            what = f"device_map[{name!r}]={place!r}" if isinstance(asked, Mapping) else f"device_map={asked!r}"
            raise UnitError(
                what, fix=f"'disk', 'cpu', a device that is there, one of {', '.join(MAPS)}, or a dict of places"
            )
    return found


def map_of(asked: Asked) -> DeviceMap:
    """The same where nothing is decided: a map, or one place.

    Raises:
        UnitError: one of :data:`MAPS`, or none of these.
        DeviceError: a device that is not there.
    """
    found = as_map(asked)
    if isinstance(found, str):
        raise UnitError(f"device_map={asked!r}", fix="infer_auto_device_map(model) makes a map that can be given")
    return found


def _is_place(place: Any) -> bool:
    """Is it the disk, or a device that is there?"""
    if isinstance(place, bool) or not isinstance(place, (str, int, torch.device)):
        return False
    if isinstance(place, str) and place != "disk":
        try:
            torch.device(place)
        except RuntimeError:  # no word for a device
            return False
    return place == "disk" or devices.named(place).type != "meta"


def as_budget(asked: Any) -> Mapping[int | str, int | str] | None:
    """``max_memory`` as given.

    Raises:
        OffloadError: it is no dict.
    """
    if asked is None or isinstance(asked, Mapping):
        return asked
    raise OffloadError(f"max_memory={asked!r}", fix="a dict by device: {'cpu': '4GiB', 0: '10GiB'}")


def as_classes(module: nn.Module, asked: Sequence[str] | str | None) -> list[str] | None:
    """Names of classes whose modules are not cut; ``None``: the default ones, also for an empty list.

    Raises:
        UnitError: the model has no module of such a class.
    """
    names = [asked] if isinstance(asked, str) else list(asked or ())
    there = {type(m).__name__ for m in module.modules()}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UnitError(
            f"no_split_module_classes names what the model does not have: {', '.join(map(repr, unknown))}",
            fix="names of classes of its modules: see type(module).__name__ of model.modules()",
        )
    return names or None


def require_places(module: nn.Module, device_map: DeviceMap) -> None:
    """Raise for parameters that a map has no place for.

    What the model's class says to need none (``_no_placement_params``) comes with the module that it is in.

    Raises:
        UnitError: names some.
    """
    free = tuple(getattr(module, "_no_placement_params", None) or ())
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    left = [n for n in names if not any(within(n, key) for key in device_map) and not any(part in n for part in free)]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UnitError(
            f"device_map has no place for {', '.join(map(repr, left[:3]))}{more}",
            fix="add entries for the modules they are in, or for ''",
        )
