"""How much memory a step takes at its peak: from the simulation of a few blocks of each kind to that of all.

Live bytes at each point of a step are linear in the number of blocks of a kind: each one adds the same saved
activations, the same states and the same gradients. Points are named by their place from the beginning or from the end
of the blocks, so that the first and the last ones, which differ, stay what they are. The peak is the largest of these
lines where all blocks are there. It need not be at the same point as with few.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shardwise.observe.live import ACTIVATIONS, Live
from shardwise.plan.recorder import Segment

Vector = dict[str, float]
"""Bytes by state; those of the host begin with ``host ``."""


@dataclass(frozen=True)
class Point:
    """A place in a step: between two turns of the engine to another unit.

    Attributes:
        phase: ``forward``, ``backward``, ``end of backward``, ``step``, ``update``, or empty.
        place: the unit, with its place in its list: from the beginning (0, 1), or from the end (-1, -2).
        before: the place before this one.
        times: how often this has been so before.
    """

    phase: str
    place: str
    before: str
    times: int


@dataclass
class Profile:
    """Live bytes at the points of a step.

    Attributes:
        device, host: at each point, bytes when most were live on the device, and on the host.
        after: at each point, the operator after which that was.
    """

    device: dict[Point, Vector]
    host: dict[Point, Vector]
    after: dict[Point, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peak:
    """The most bytes that are live at one time.

    Attributes:
        nbytes: all of them.
        states: by state.
        phase, place, after: when that is: see :class:`Point` and :class:`Segment`.
    """

    nbytes: int
    states: Mapping[str, int]
    phase: str
    place: str
    after: str = ""

    @property
    def activations(self) -> int:
        return self.states.get(ACTIVATIONS, 0)

    def __str__(self) -> str:
        at = f"{self.phase or 'outside of passes'} of {self.place}" if self.place else self.phase or "outside of passes"
        return f"{at}, {self.after}" if self.after else at


def profile(segments: Iterable[Segment], lengths: Mapping[str, tuple[int, int]]) -> Profile:
    """Name the points of a recorded step.

    Args:
        segments: as recorded.
        lengths: per list of blocks, how long it is in this simulation, and in the one with the fewest.
    """
    out = Profile({}, {})
    counts: dict[tuple[str, str, str], int] = {}
    before = ""
    for segment in segments:
        place = _place(segment.unit, lengths)
        key = segment.phase, place, before
        point = Point(*key, counts.get(key, 0))
        counts[key] = point.times + 1
        before = place
        out.device[point], out.host[point] = _vector(segment.peak), _vector(segment.host_peak)
        out.after[point] = segment.after
    return out


def _place(unit: str, lengths: Mapping[str, tuple[int, int]]) -> str:
    name = unit.strip("'")
    for path, (length, fewest) in lengths.items():
        found = re.match(re.escape(path) + r"\.(\d+)", name)
        if found:
            index, half = int(found[1]), (fewest + 1) // 2
            if index < half:
                place = str(index)
            elif index >= length - (fewest - half):
                place = str(index - length)
            else:
                place = "between"
            return f"{path}.{place}{name[found.end() :]}"
    return name


def _vector(live: Live) -> Vector:
    return {**live.device, **{f"host {state}": nbytes for state, nbytes in live.host.items()}}


def extrapolate(base: Profile, more: Sequence[tuple[Profile, float]]) -> Profile:
    """The same step with more of something.

    Args:
        base: with the fewest.
        more: profiles with one more of each thing in turn (a block of a kind), and how many more there are to be.
    """
    out = Profile({}, {}, dict(base.after))
    for values, name in ((out.device, "device"), (out.host, "host")):
        first: dict[Point, Vector] = getattr(base, name)
        for point, vector in first.items():
            if "between" in point.place or "between" in point.before:
                continue
            total = dict(vector)
            for other, count in more:
                theirs: Vector | None = getattr(other, name).get(point)
                if theirs is not None:
                    for state, nbytes in theirs.items():
                        total[state] = total.get(state, 0) + count * (nbytes - vector.get(state, 0))
            values[point] = total
    return out


def peak(found: Profile, *, host: bool = False) -> Peak:
    """When the most bytes are live.

    Args:
        host: in the host's memory instead of the device's.
    """
    values = found.host if host else found.device
    best, most = None, -1.0
    for point, vector in values.items():
        total = sum(v for k, v in vector.items() if k.startswith("host ") is host)
        if total > most:
            best, most = point, total
    if best is None:
        return Peak(0, {}, "", "")
    states = {
        k.removeprefix("host "): round(v) for k, v in values[best].items() if k.startswith("host ") is host and v > 0
    }
    return Peak(round(most), states, best.phase, best.place, found.after.get(best, ""))
