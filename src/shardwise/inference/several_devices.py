"""Which units run on which of several devices, and where their weights stay there.

Units are cut into as many rows as there are devices, in the order in which they run: what comes out of one device goes
to the next, once. Within a device everything is as it is for one: see :mod:`shardwise.inference.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from shardwise.errors import OffloadError
from shardwise.inference.plan import HOST, Room, Usage, Weights, WeightsPlan, given, place_weights
from shardwise.sizes import format_bytes

_STEPS = 40  # of a bisection


@dataclass(frozen=True)
class PlanOfDevices(WeightsPlan):
    """A plan for each device, and all of them as one.

    Args:
        plans: by device, in the order in which the model runs through them.
    """

    plans: dict[torch.device, WeightsPlan] = field(default_factory=dict)

    @classmethod
    def of(cls, plans: Mapping[torch.device, WeightsPlan]) -> PlanOfDevices:
        """Of plans that have different units."""
        found = list(plans.values())
        homes = {name: home for plan in found for name, home in plan.homes.items()}
        nbytes = {name: size for plan in found for name, size in plan.nbytes.items()}
        streaming, beside, padding = (sum(getattr(p, n) for p in found) for n in ("streaming", "beside", "padding"))
        return cls(homes, nbytes, streaming, 1, beside, padding, found[0].ahead, plans=dict(plans))

    @property
    def places(self) -> dict[str, torch.device]:
        """The device of each unit."""
        return {name: device for device, plan in self.plans.items() for name in plan.homes}

    def __str__(self) -> str:
        return "\n".join(f"{device}\n{plan}" for device, plan in self.plans.items())


def plan_of_places(
    weights: Sequence[Weights],
    homes: Mapping[str, str],
    places: Mapping[str, torch.device],
    ahead: int | None = None,
    fixed: int = 0,
    cache: int = 0,
    usage: Usage | None = None,
) -> WeightsPlan:
    """The plan of a map that somebody has made: of several devices where it names several.

    Args:
        homes, places: of each unit.
        ahead, fixed, cache: as for :func:`place_on_devices`.
        usage: for forecasts, if all of it is on one device.
    """
    plans: dict[torch.device, WeightsPlan] = {}
    for device in dict.fromkeys(places[w.name] for w in weights):
        its = [w for w in weights if places[w.name] == device]
        plans[device] = given(its, homes, fixed + _part(cache, its, weights), ahead, usage)
    return PlanOfDevices.of(plans) if len(plans) > 1 else next(iter(plans.values()))


def require_room(plan: WeightsPlan, main: torch.device, rooms: Mapping[torch.device, int], host: int) -> None:
    """Raise if a plan that somebody has made does not fit.

    Args:
        main: its device, if it has only one.
        rooms: bytes of each device that may be used. One that is not in it is not looked at.
        host: bytes of host memory, likewise.

    Raises:
        OffloadError: says how much is missing, and where.
    """
    plans = plan.plans if isinstance(plan, PlanOfDevices) else {main: plan}
    needs = [(str(device), its.device, rooms[device]) for device, its in plans.items() if device in rooms]
    for what, needed, there in (*needs, ("the host", plan.total(HOST), host)):
        if needed > there:
            raise OffloadError(
                f"this map takes {format_bytes(needed)} of {what}, and {format_bytes(there)} are allowed",
                fix="put more on 'disk' or on another device, or let device_map='auto' choose",
            )


def place_on_devices(
    weights: Sequence[Weights],
    rooms: Mapping[torch.device, int],
    host: int,
    *,
    ahead: int | None,
    fixed: int = 0,
    cache: int = 0,
    order: str = "balanced",
) -> PlanOfDevices:
    """Choose a device and a home for each unit.

    Args:
        weights: in the order in which they run.
        rooms: bytes of each device that may be used, in the order in which the model runs through them.
        host: likewise of host memory.
        ahead: units that are read ahead of the next one.
        fixed: bytes beside weights, on each device.
        cache: bytes of keys and values, which are where their blocks are.
        order: ``sequential``: fill one device before the next. ``balanced_low_0``: the first one gets what the others
            have no room for. Otherwise each gets a part that goes with its memory. Where not all fits, each does
            anyway: then all of them have streaming to do.

    Raises:
        OffloadError: a device does not even hold the units on their way.
    """
    total = sum(w.nbytes for w in weights)
    free = [max(room - fixed, 0) * total // max(total + cache, 1) for room in rooms.values()]
    if order == "balanced_low_0":
        free[0] = max(min(free[0], total - sum(free[1:])), 0)
    rows = _rows(weights, free, fill=order == "sequential") or _by_share(weights, free)
    plans: dict[torch.device, WeightsPlan] = {}
    for k, ((device, room), row) in enumerate(zip(rooms.items(), rows, strict=True)):
        if row:
            left = [w for later in rows[k:] for w in later]
            beside = fixed + _part(cache, row, weights)
            try:
                plans[device] = place_weights(row, Room(room, _part(host, row, left), beside), ahead=ahead)
            except OffloadError as error:
                raise OffloadError(error.what, where=str(device), fix=error.fix) from error
            host -= plans[device].total(HOST)
    return PlanOfDevices.of(plans)


def _part(whole: int, row: Sequence[Weights], of: Sequence[Weights]) -> int:
    return whole * sum(w.nbytes for w in row) // max(sum(w.nbytes for w in of), 1)


def _rows(weights: Sequence[Weights], free: Sequence[int], *, fill: bool) -> list[list[Weights]] | None:
    """Rows that fit, ``None`` if none do. Not to fill the first: the smallest part of each that is enough."""
    best = _cut(weights, free)
    if best is None or fill:
        return best
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _cut(weights, [int(size * middle) for size in free])
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _cut(weights: Sequence[Weights], limits: Sequence[int]) -> list[list[Weights]] | None:
    rows: list[list[Weights]] = [[] for _ in limits]
    at = used = 0
    for w in weights:
        while used + w.nbytes > limits[at]:
            at, used = at + 1, 0
            if at == len(limits):
                return None
        rows[at].append(w)
        used += w.nbytes
    return rows


def _by_share(weights: Sequence[Weights], free: Sequence[int]) -> list[list[Weights]]:
    """Rows in proportion to what is free, whether they fit or not."""
    rows: list[list[Weights]] = [[] for _ in free]
    total, seen = sum(w.nbytes for w in weights), 0
    for w in weights:
        middle = (seen + w.nbytes / 2) / max(total, 1) * sum(free)
        at = next((k for k in range(len(free)) if middle <= sum(free[: k + 1])), len(free) - 1)
        rows[at].append(w)
        seen += w.nbytes
    return rows
