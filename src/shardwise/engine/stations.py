"""Which modules of a model that is on several devices are stations, on which device, and whose outputs stay there.

See :mod:`shardwise.engine.crossings` for what a station does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from shardwise.engine.select import has_forward

Members = dict[str, list[tuple[nn.Parameter, list[str]]]]


def keep_together(of_unit: Members, places: Mapping[str, torch.device]) -> None:
    """Give units parameters of others where one module holds parameters of units on different devices.

    A tied one, as a rule, beside one of its own: the outermost of these units takes both.

    Args:
        of_unit: which unit answers for which parameters; changed in place.
        places: devices of the units.
    """
    owner = {id(p): unit for unit, its in of_unit.items() for p, _ in its}
    of_module: dict[str, set[int]] = {}
    for its in of_unit.values():
        for p, names in its:
            for name in names:
                of_module.setdefault(name.rpartition(".")[0], set()).add(id(p))
    again = True
    while again:
        again = False
        for keys in of_module.values():
            units = {owner[key] for key in keys}
            if len({places[unit] for unit in units}) > 1:
                owner |= dict.fromkeys(keys, min(units, key=len))  # all of them are around the module
                again = True
    members = [pair for its in of_unit.values() for pair in its]
    for its in of_unit.values():
        its.clear()
    for p, names in members:
        of_unit[owner[id(p)]].append((p, names))


class Where:
    """On which device modules compute."""

    def __init__(self, root: nn.Module, of_unit: Members, places: Mapping[str, torch.device]) -> None:
        self._places = places
        self._held = {
            name.rpartition(".")[0]: places[unit]
            for unit, its in of_unit.items() for _, names in its for name in names
        }  # fmt: skip
        self._holders = {name for name, module in root.named_modules() if module._parameters or module._buffers}
        self._inside: dict[str, set[torch.device]] = {}
        for name in {*self._holders, *places}:
            at, above = self.of(name), name
            while above:
                above = above.rpartition(".")[0]
                self._inside.setdefault(above, set()).add(at)

    def of(self, name: str) -> torch.device:
        """Of the parameters that a module holds; else of the innermost unit that it is in."""
        found = self._held.get(name)
        while found is None:
            found = self._places.get(name)
            name = name.rpartition(".")[0]
        return found

    def own(self, name: str) -> bool:
        """Has a module a device of its own? Others only call modules."""
        return name in self._holders or name in self._places

    def inside(self, name: str) -> Collection[torch.device]:
        """The devices of all that is in a module."""
        return self._inside.get(name, ())


def stations(
    module: nn.Module, name: str, here: torch.device, where: Where, *, chain: bool, nested: bool
) -> Iterator[tuple[nn.Module, torch.device, torch.device | None]]:
    """Modules, each with its device and that of the code around it; ``None`` where its outputs stay.

    Args:
        here: device of the module's own code.
        nested: it is in a station.
    """
    inner = list(module.named_children())
    for at, (key, child) in enumerate(inner):
        full = f"{name}.{key}" if name else key
        if not where.own(full) or not has_forward(child):
            yield from stations(child, full, here, where, chain=chain, nested=nested)
            continue
        device = where.of(full)
        if not nested or device != here:
            stays = not nested and _in_chain(module, inner, at, chain=chain)
            yield child, device, None if stays else here
        if any(other != device for other in where.inside(full)):
            yield from stations(child, full, device, where, chain=chain, nested=True)


def _in_chain(parent: nn.Module, inner: list[tuple[str, nn.Module]], at: int, *, chain: bool) -> bool:
    """Does what a child returns go on to another station only?"""
    if isinstance(parent, nn.Sequential) and at < len(inner) - 1:
        return True
    if not chain or isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return chain
    # Tables of words and positions, which are added, stand before the blocks.
    return not any(isinstance(m, nn.ModuleList) for _, later in inner[at + 1 :] for m in later.modules())
