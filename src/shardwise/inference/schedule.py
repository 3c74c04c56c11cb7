"""When a streamed forward waits: its reads and its computing, unit after unit, played through without a model.

::

    unit i:  wait until it is here · begin to bring the next ones, as many as there is room for · compute · let go

The disk brings one unit after the other, and so does the link to a device with memory of its own; units compute one
after the other. That is all that is known here: no torch, no files, so that every rule can be tried by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

_PASSES = 3  # the first begins with nothing here, the last is what all others are like
_TRIES = 400  # schedules that are played through to choose one: a tenth of a second for a hundred units


class Step(NamedTuple):
    """One unit in a forward.

    Args:
        nbytes: what it takes while it is here; 0: it stays.
        disk, link: seconds in which it occupies the disk, and the link to the device.
        compute: seconds.
        last: index of the last unit inside of it, itself if there is none: until then it is here.
    """

    nbytes: int
    disk: float
    link: float
    compute: float
    last: int


class Forecast(NamedTuple):
    """Seconds of a forward like those before and behind it, and how long each of its parts is busy in them."""

    seconds: float
    disk: float
    link: float
    compute: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"compute": self.compute, "the disk": self.disk, "the link to the device": self.link}
        return max(parts, key=lambda name: parts[name])


def forecast(steps: Sequence[Step], room: int) -> Forecast:
    """Play forwards through, one behind the other.

    Args:
        steps: the units, in the order in which they run.
        room: bytes for units that come and go. The one that is next is begun even if it holds less.
    """
    count = len(steps)
    total = _PASSES * count
    ends: list[list[int]] = [[] for _ in range(count)]  # who is let go when this one has computed
    for i, step in enumerate(steps):
        ends[step.last].append(i)
    arrived = [0.0] * total
    now = disk = link = before = 0.0
    taken = coming = 0  # bytes, and the next one to be begun

    def begin(k: int) -> None:
        nonlocal disk, link, taken
        step, at = steps[k % count], now
        if step.disk:
            at = disk = max(disk, at) + step.disk
        if step.link:
            at = link = max(link, at) + step.link
        arrived[k] = at
        taken += step.nbytes

    for k in range(total):
        if coming == k:
            begin(k)
            coming += 1
        now = max(now, arrived[k])
        while coming < total and (coming == k + 1 or taken + steps[coming % count].nbytes <= room):
            begin(coming)
            coming += 1
        now += steps[k % count].compute
        taken -= sum(steps[i].nbytes for i in ends[k % count])
        if k == total - count - 1:
            before = now
    parts = [sum(getattr(step, part) for step in steps) for part in ("disk", "link", "compute")]
    return Forecast(now - before, *parts)


def best(
    sizes: Sequence[int], room: int, begun: Sequence[frozenset[int]], seconds: Callable[[frozenset[int]], float]
) -> frozenset[int]:
    """Choose which units stay: from the best of some choices on, by exchanging, adding and leaving out, while it pays.

    Args:
        sizes: bytes of each unit that stays.
        room: bytes for those that stay.
        begun: choices that fit.
        seconds: what a choice takes. Called :data:`_TRIES` times at most beyond ``begun``.

    Returns:
        Indices. Never slower than the best of ``begun``.
    """
    chosen = min(begun, key=seconds)
    cost, tries = seconds(chosen), 0
    improved = True
    while improved and tries < _TRIES:
        improved = False
        for other in _neighbours(chosen, sizes, room):
            if tries == _TRIES:
                break
            tries += 1
            found = seconds(other)
            if found < cost * (1 - 1e-6):
                chosen, cost, improved = other, found, True
                break
    return chosen


def _neighbours(chosen: frozenset[int], sizes: Sequence[int], room: int) -> list[frozenset[int]]:
    """Choices that differ in one unit, or in two that change places: near ones first."""
    free = room - sum(sizes[i] for i in chosen)
    away = [i for i in range(len(sizes)) if i not in chosen and sizes[i]]
    out = [chosen | {i} for i in away if sizes[i] <= free]
    pairs = [(abs(i - k), i, k) for i in away for k in chosen if sizes[i] - sizes[k] <= free and sizes[k]]
    out += [chosen - {k} | {i} for _, i, k in sorted(pairs)]
    return out + [chosen - {k} for k in sorted(chosen) if sizes[k]]
