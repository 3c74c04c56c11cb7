"""Which weights stay where while a model runs: on the device, in host memory, or in their files.

A unit whose weights come from elsewhere takes time only where that is not hidden under the computing of others. So what
stays on the device is spread evenly between what streams: the link or the disk then has work all the time, and never
has to be waited for longer than one unit takes. What does not fit is refused before anything is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.comm.joined import JOINED_BYTES
from shardwise.errors import OffloadError
from shardwise.sizes import format_bytes

DEVICE, HOST, DISK = "device", "cpu", "nvme"
_WORDS = {DEVICE: "device", HOST: "host memory", DISK: "disk"}


@dataclass(frozen=True)
class Weights:
    """The weights of one unit.

    Args:
        name: of its module.
        nbytes: as they are used, of all ranks.
    """

    name: str
    nbytes: int


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
class WeightsPlan:
    """Where the weights of each unit are between two uses.

    Args:
        homes: ``device``, ``cpu`` or ``nvme``, by name of the unit.
        nbytes: by name of the unit.
        ahead: units that are read ahead of the next one.
        parts: ranks that split each unit.
        beside: bytes of the device that are not for weights.
    """

    homes: dict[str, str]
    nbytes: dict[str, int]
    ahead: int
    parts: int = 1
    beside: int = 0

    def total(self, home: str) -> int:
        """Bytes at a home, on this rank."""
        return sum(-(-self.nbytes[name] // self.parts) for name, at in self.homes.items() if at == home)

    @property
    def streaming(self) -> int:
        """Bytes of the device for units that come and go: the one that runs and those on their way."""
        going = sorted((self.nbytes[n] for n, at in self.homes.items() if at != DEVICE or self.parts > 1), reverse=True)
        small = sum(nbytes for nbytes in going if nbytes < JOINED_BYTES) if self.parts > 1 else 0
        return sum(going[: self.ahead + 2]) + 2 * min(JOINED_BYTES, small)  # which travel together, and are packed

    @property
    def device(self) -> int:
        """Bytes of the device, at most."""
        return self.total(DEVICE) + self.streaming + self.beside

    def __str__(self) -> str:
        rows = [("", "units", "weights")]
        for home in (DEVICE, HOST, DISK):
            count = sum(at == home for at in self.homes.values())
            if count:
                rows.append((_WORDS[home], str(count), format_bytes(self.total(home))))
        if self.streaming:
            rows.append(("device: units on their way", str(self.ahead + 2), format_bytes(self.streaming)))
        rows.append(("device: activations and cache", "", format_bytes(self.beside)))
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}".rstrip() for name, count, size in rows
        )


def place_weights(units: Sequence[Weights], room: Room, *, parts: int = 1, ahead: int = 1) -> WeightsPlan:
    """Choose homes.

    Args:
        units: in the order in which they run.
        room: what there is, on each rank.
        parts: ranks that split each unit.
        ahead: units that are read ahead of the next one.

    Raises:
        OffloadError: not even the units on their way fit; says what is missing.
    """
    nbytes = {u.name: u.nbytes for u in units}
    all_here = WeightsPlan({u.name: DEVICE for u in units}, nbytes, ahead, parts, room.beside)
    if all_here.total(DEVICE) + (all_here.streaming if parts > 1 else 0) + room.beside <= room.device:
        return all_here
    moving = WeightsPlan({u.name: DISK for u in units}, nbytes, ahead, parts).streaming
    free = room.device - room.beside - moving
    if free < 0:
        raise OffloadError(
            f"{format_bytes(room.device)} of the device do not hold {format_bytes(moving)} of weights on their way and "
            f"{format_bytes(room.beside)} of activations and cache",
            fix=f"give {format_bytes(moving + room.beside)} at least, cut the model into smaller units "
            "(no_split_module_classes), or use a smaller batch or length",
        )
    homes = _spread(units, free * parts)
    rest = [u for u in units if homes[u.name] != DEVICE]
    homes |= {n: HOST for n, at in _spread(rest, room.host * parts).items() if at == DEVICE}
    return WeightsPlan(homes, nbytes, ahead, parts, room.beside)


def _spread(units: Sequence[Weights], room: int) -> dict[str, str]:
    """Keep ``room`` bytes of weights here, evenly spread; the rest is on the disk."""
    total, out = sum(u.nbytes for u in units), dict[str, str]()
    kept, seen = 0, 0
    for unit in units:
        seen += unit.nbytes
        wanted = room * seen // max(total, 1)  # what should have been kept by now
        stays = kept + unit.nbytes <= min(room, wanted + unit.nbytes // 2)
        kept += unit.nbytes * stays
        out[unit.name] = DEVICE if stays else DISK
    for unit in sorted((u for u in units if out[u.name] == DISK), key=lambda u: -u.nbytes):
        if kept + unit.nbytes <= room:  # what rounding left
            out[unit.name] = DEVICE
            kept += unit.nbytes
    return out
