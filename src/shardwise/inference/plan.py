"""Which weights stay where while a model runs: on the device, in host memory, or in their files.

A unit whose weights come from elsewhere takes time only where that is not hidden under the computing of others. So
what stays is chosen by playing forwards through (:mod:`shardwise.inference.schedule`), from evenly spread on. What is
left of the memory is for looking ahead. What does not fit is refused before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardwise.comm.joined import JOINED_BYTES
from shardwise.errors import OffloadError
from shardwise.inference.rates import Rates
from shardwise.inference.schedule import Forecast, Step, best, forecast
from shardwise.sizes import format_bytes

DEVICE, HOST, DISK = "device", "cpu", "nvme"
_WORDS = {DEVICE: "device", HOST: "host memory", DISK: "disk"}
_TOKENS = 100  # words that are written behind a prompt, where both cannot be fast


@dataclass(frozen=True)
class Weights:
    """The weights of one unit.

    Args:
        name: of its module.
        nbytes: as they are used, of all ranks.
        buffer: bytes of the memory they come and go in; 0: as many.
        each: elements of matrices that every token is multiplied with. ``last``: likewise, the last of a text only.
    """

    name: str
    nbytes: int
    buffer: int = 0
    each: float = 0.0
    last: float = 0.0

    @property
    def going(self) -> int:
        return max(self.nbytes, self.buffer)


@dataclass(frozen=True)
class Room:
    """What weights may take, in bytes.

    Args:
        device: where the model runs.
        host: of host memory; of a model that runs on the CPU that is ``device``, and this is 0.
        beside: what else the run takes on the device: activations, logits, the cache of keys and values, buffers.
    """

    device: int
    host: int
    beside: int = 0


@dataclass(frozen=True)
class Usage:
    """What a model is used for: ``batch`` texts at a time, of ``length`` tokens each; and how fast everything is."""

    batch: int
    length: int
    rates: Rates


@dataclass(frozen=True)
class WeightsPlan:
    """Where the weights of each unit are between two uses.

    Args:
        homes: ``device``, ``cpu`` or ``nvme``, by name of the unit.
        nbytes: by name of the unit.
        streaming: bytes of the device for units that come and go: those that run and those on their way.
        parts: ranks that split each unit.
        beside: bytes of the device that are not for weights.
        padding: bytes that the buffers of what stays on the device are longer than its weights.
        ahead: units that are read ahead through a host buffer each, to a device with memory of its own.
        forecasts: what a forward takes, by what it is; empty: nobody asked.
        rates: what they are made of.
    """

    homes: dict[str, str]
    nbytes: dict[str, int]
    streaming: int
    parts: int = 1
    beside: int = 0
    padding: int = 0
    ahead: int = 1
    forecasts: Mapping[str, Forecast] | None = None
    rates: Rates | None = None

    def total(self, home: str) -> int:
        """Bytes at a home, on this rank."""
        return sum(-(-self.nbytes[name] // self.parts) for name, at in self.homes.items() if at == home)

    @property
    def device(self) -> int:
        """Bytes of the device, at most."""
        return self.total(DEVICE) + self.padding + self.streaming + self.beside

    def __str__(self) -> str:
        shown = self.forecasts or {}
        rows = [("", "units", "weights", *(["read per forward"] if shown else []))]
        for home in (DEVICE, HOST, DISK):
            count = sum(at == home for at in self.homes.values())
            if count:
                busy = next(iter(shown.values()), None)
                times = {HOST: busy.link if busy else 0, DISK: busy.disk if busy else 0}
                read = [f"{times[home]:.3g} s" if times.get(home) else ""] if shown else []
                rows.append((_WORDS[home], str(count), format_bytes(self.total(home)), *read))
        rest = [""] if shown else []
        if self.streaming:
            rows.append(("device: units on their way", "", format_bytes(self.streaming), *rest))
        rows.append(("device: activations and cache", "", format_bytes(self.beside), *rest))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(
                [f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        for what, f in shown.items():
            parts = [
                f"computing {f.compute:.3g} s",
                f"disk {f.disk:.3g} s",
                *([f"link {f.link:.3g} s"] if f.link else []),
            ]
            lines.append(f"{what}: {f.seconds:.3g} s ({', '.join(parts)}): bound by {f.bound}")
        if self.rates is not None and shown:
            r = self.rates
            disk = f"disk {r.disk / 1e9:.2g} GB/s{'' if r.measured else ' (supposed)'}"
            link = [f"link {r.link / 1e9:.2g} GB/s"] if r.link else []
            products = f"matrix products {2e-9 / r.short:.3g} to {2e-9 / r.long:.3g} GFLOP/s"
            lines.append(", ".join([f"measured: {disk}", *link, products]))
        return "\n".join(line.rstrip() for line in lines)


def least(units: Sequence[Weights]) -> int:
    """Bytes of the device without which units cannot come and go: the one that runs, those that it is inside of, and
    the largest other one, which is brought meanwhile."""
    found = 0
    for unit in units:
        around = [u for u in units if u is unit or _inside(unit.name, u.name)]
        other = max((u.going for u in units if u not in around), default=0)
        found = max(found, sum(u.going for u in around) + other)
    return found


def streaming_room(units: Sequence[Weights], parts: int, ahead: int = 1) -> int:
    """Bytes for units that come and go, where memory is not short.

    Args:
        units: which do.
        ahead: how many of the largest there is room for beside the one that runs and the one that is next.
    """
    going = sorted((u.going for u in units), reverse=True)
    return max(least(units), sum(going[: ahead + 2])) + _packed(units, parts)


def _packed(units: Sequence[Weights], parts: int) -> int:
    """Bytes for what travels together between ranks, and is packed."""
    small = sum(u.going for u in units if u.going < JOINED_BYTES) if parts > 1 else 0
    return 2 * min(JOINED_BYTES, small)


def place_weights(
    units: Sequence[Weights], room: Room, *, parts: int = 1, ahead: int | None = None, usage: Usage | None = None
) -> WeightsPlan:
    """Choose homes.

    Args:
        units: in the order in which they run.
        room: what there is, on each rank.
        parts: ranks that split each unit.
        ahead: there has to be room for so many of the largest units beside the one that runs and the next one.
            ``None``: for what is fastest.
        usage: what the model is used for. ``None``: what stays is evenly spread.

    Raises:
        OffloadError: not even the units on their way fit; says what is missing.
    """
    all_here = whole(units, room, parts, ahead)
    if all_here.device <= room.device:
        return all_here
    nbytes, sizes = all_here.nbytes, [u.going for u in units]
    for_moving = [streaming_room(units, parts, a) for a in ((-1, 0, 1, 2, 4) if ahead is None else (ahead,))]
    free = room.device - room.beside
    if free < for_moving[0]:
        raise OffloadError(
            f"{format_bytes(room.device)} of the device do not hold {format_bytes(for_moving[0])} of weights on their "
            f"way and {format_bytes(room.beside)} of activations and cache",
            fix=f"give {format_bytes(for_moving[0] + room.beside)} at least, cut the model into smaller units "
            "(no_split_module_classes), or use a smaller batch or length",
        )

    def homes_of(kept: frozenset[int]) -> dict[str, str]:
        rest = [u for i, u in enumerate(units) if i not in kept]
        on_host = {rest[k].name for k in spread([u.going for u in rest], room.host * parts)}
        return {u.name: DEVICE if i in kept else HOST if u.name in on_host else DISK for i, u in enumerate(units)}

    def left(kept: frozenset[int]) -> int:
        """Bytes for what comes and goes."""
        there = free - sum(-(-sizes[i] // parts) for i in kept)
        going = [u for i, u in enumerate(units) if i not in kept or parts > 1]
        return there if ahead is None else min(there, streaming_room(going, parts, ahead))

    def told(kept: frozenset[int]) -> dict[str, Forecast]:
        return {} if usage is None else forecasts_of(units, homes_of(kept), left(kept), parts, usage)

    def seconds(kept: frozenset[int]) -> float:
        prompt, word = told(kept).values()
        return prompt.seconds + _TOKENS * word.seconds

    even = [spread(sizes, (free - moving) * parts) for moving in for_moving if moving <= free]
    if usage is None:
        kept = even[min(2, len(even) - 1)]
    else:
        kept = best(sizes, (free - for_moving[0]) * parts, even, seconds)
    padding = sum(-(-sizes[i] // parts) for i in kept) - sum(-(-units[i].nbytes // parts) for i in kept)
    rates = None if usage is None else usage.rates
    count = 1 if ahead is None else ahead
    return WeightsPlan(homes_of(kept), nbytes, left(kept), parts, room.beside, padding, count, told(kept), rates)


def given(
    units: Sequence[Weights], homes: Mapping[str, str], beside: int, ahead: int | None, usage: Usage | None
) -> WeightsPlan:
    """The plan of homes that somebody has chosen, with room for as many units as ``ahead`` asks for."""
    going = [u for u in units if homes[u.name] != DEVICE]
    padding = sum(u.going - u.nbytes for u in units if homes[u.name] == DEVICE)
    moving = streaming_room(going, 1, 1 if ahead is None else ahead) if going else 0
    return WeightsPlan(
        {u.name: homes[u.name] for u in units}, {u.name: u.nbytes for u in units}, moving, 1, beside, padding,
        1 if ahead is None else ahead, {} if usage is None else forecasts_of(units, homes, moving, 1, usage),
        None if usage is None else usage.rates,
    )  # fmt: skip


def whole(units: Sequence[Weights], room: Room, parts: int = 1, ahead: int | None = None) -> WeightsPlan:
    """The plan of a model that is on the device as a whole, or as far as ranks split it. It may not fit."""
    passing = streaming_room(units, parts, 1 if ahead is None else ahead) if parts > 1 else 0
    padding = sum(-(-u.going // parts) + -u.nbytes // parts for u in units)
    homes = {u.name: DEVICE for u in units}
    return WeightsPlan(
        homes, {u.name: u.nbytes for u in units}, passing, parts, room.beside, padding, 1 if ahead is None else ahead
    )


def forecasts_of(
    units: Sequence[Weights], homes: Mapping[str, str], streaming: int, parts: int, usage: Usage
) -> dict[str, Forecast]:
    """What forwards take, by what they are: all tokens of a prompt, and one more token.

    Args:
        units: in the order in which they run.
        homes: of each.
        streaming: bytes for those that come and go.
        parts: ranks that split each, and read a part of it.
        usage: see :class:`Usage`.
    """
    rates, texts, tokens = usage.rates, usage.batch, usage.batch * usage.length
    inside = [max((k for k, v in enumerate(units) if _inside(v.name, u.name)), default=i) for i, u in enumerate(units)]

    def steps(each: float, last: float) -> list[Step]:
        out = []
        for i, u in enumerate(units):
            at, share = homes[u.name], u.nbytes / parts
            moving = u.going if at != DEVICE or parts > 1 else 0
            disk = share / rates.disk if at == DISK else 0.0
            link = share / rates.link if at != DEVICE and rates.link else 0.0
            out.append(Step(moving, disk, link, u.each * each + u.last * last, max(i, inside[i])))
        return out

    short = texts * rates.short
    each = tokens * (rates.long if tokens > rates.batch else rates.short)
    return {
        f"a prompt of {tokens} tokens": forecast(steps(each, short), streaming),
        "one more token": forecast(steps(short, short), streaming),
    }


def _inside(name: str, other: str) -> bool:
    """Is a module inside of another one?"""
    return name != other and (not other or name.startswith(f"{other}."))


def spread(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Which units stay if ``room`` bytes may, evenly spread between those that do not."""
    total, kept, seen = sum(sizes), 0, 0
    out = set()
    for i, size in enumerate(sizes):
        seen += size
        wanted = room * seen // max(total, 1)  # what should have been kept by now
        if kept + size <= min(room, wanted + size // 2):
            kept += size
            out.add(i)
    for i in sorted((i for i in range(len(sizes)) if i not in out), key=lambda i: -sizes[i]):
        if kept + sizes[i] <= room:  # what rounding left
            out.add(i)
            kept += sizes[i]
    return frozenset(out)
