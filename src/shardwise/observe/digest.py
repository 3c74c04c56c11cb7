"""From what a rank did, moment by moment, to the lines that its record keeps: sums of a step, and its timeline.

Moments are tuples ``(time, kind, a, b, c, d)``; times are ``perf_counter``'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PHASE, START, WAIT, WAITED = range(4)
Moment = tuple[float, int, Any, Any, Any, Any]
"""``PHASE``: phase, unit, live bytes by state, thread. ``START``: way, name, bytes, thread. ``WAIT`` and ``WAITED``:
way, name, nothing, thread."""

OUTSIDE = "outside"  # neither in a pass of a model nor in a step: data, what the script does itself
EVALUATION = "evaluation"  # forwards without gradients, and what is between them


class Sums:
    """What one step comes to.

    Attributes:
        seconds: by phase, waits included.
        waits: seconds by way in which the thread that computes went no further.
        sent: bytes by way.
        peak: the most live bytes by state, at turns from phase to phase; the last is the most of all together.
        live: bytes by state, at the last turn.
    """

    def __init__(self, states: int) -> None:
        self._at, self._since = OUTSIDE, 0.0
        self._open: dict[int, list[tuple[str, float]]] = {}
        self._computes: set[int] = set()  # threads that turn to phases; others work beside them
        self._states = states
        self.live: Sequence[int] = (0,) * states
        self.restart(0.0)

    def restart(self, now: float) -> None:
        """A new step begins; what is under way goes on."""
        self._since = now
        self.seconds: dict[str, float] = {}
        self.waits: dict[str, float] = {}
        self.sent: dict[str, int] = {}
        self.peak = [*self.live, sum(self.live)]

    def take(self, moments: Iterable[Moment]) -> None:
        """More of them, in their order."""
        seconds, waits, sent, peak = self.seconds, self.waits, self.sent, self.peak
        for time, kind, a, _, c, thread in moments:
            if kind == PHASE:
                self._computes.add(thread)
                seconds[self._at] = seconds.get(self._at, 0.0) + time - self._since
                self._at, self._since = a, time
                self.live = c
                for i, nbytes in enumerate(c):
                    if nbytes > peak[i]:
                        peak[i] = nbytes
                total = sum(c)
                if total > peak[-1]:
                    peak[-1] = total
            elif kind == START:
                sent[a] = sent.get(a, 0) + c
            elif kind == WAIT:
                self._open.setdefault(thread, []).append((a, time))
            elif opened := self._open.get(thread):
                way, since = opened.pop()
                if not opened and thread in self._computes:  # one inside another is counted once
                    waits[way] = waits.get(way, 0.0) + time - since

    def until(self, now: float) -> None:
        """The step ends here."""
        self.seconds[self._at] = self.seconds.get(self._at, 0.0) + now - self._since
        self._since = now


def timeline(step: int, moments: Sequence[Moment], zero: float, most: int) -> dict[str, Any]:
    """One step in full: see :mod:`shardwise.observe.record` for what the line holds.

    Args:
        most: moments to keep; what comes later is left out and counted.
    """
    numbers: dict[str, int] = {}

    def name(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    def at(time: float) -> int:
        return round((time - zero) * 1e6)

    phases: list[list[int]] = []
    memory: list[list[int]] = []
    transfers: list[list[int | None]] = []
    waits: list[list[int]] = []
    under_way: dict[tuple[str, str], deque[list[int | None]]] = {}
    opened: dict[tuple[int, str, str], float] = {}
    computes = {m[5] for m in moments if m[1] == PHASE}
    for time, kind, a, b, c, thread in moments[:most]:
        if kind == PHASE:
            phases.append([at(time), name(a), name(b)])
            if not memory or memory[-1][1:] != list(c):
                memory.append([at(time), *c])
        elif kind == START:
            transfers.append([at(time), None, name(a), name(b), c])
            under_way.setdefault((a, b), deque()).append(transfers[-1])
        elif kind == WAIT:
            opened.setdefault((thread, a, b), time)
        else:
            since = opened.pop((thread, a, b), None)
            if since is not None:
                waits.append([at(since), at(time), name(a), name(b), int(thread not in computes)])
            if begun := under_way.get((a, b)):
                begun.popleft()[1] = at(time)
    return {
        "kind": "timeline", "step": step, "names": list(numbers), "phases": phases, "memory": memory,
        "transfers": transfers, "waits": waits, "left_out": max(0, len(moments) - most),
    }  # fmt: skip


def cut(moments: list[Moment], end: float) -> tuple[list[Moment], list[Moment]]:
    """Those up to a time, and the rest, which is short: what a script does between two steps."""
    k = len(moments)
    while k and moments[k - 1][0] > end:
        k -= 1
    return moments[:k], moments[k:]


def known_sum(numbers: Sequence[int | None]) -> int | None:
    """``None`` where one is not known, or there are none."""
    known = [n for n in numbers if n is not None]
    return sum(known) if known and len(known) == len(numbers) else None


def rounded(table: Mapping[str, float]) -> dict[str, float]:
    """To microseconds."""
    return {key: round(value, 6) for key, value in table.items()}


def scaled(counted: tuple[int, int] | None, tokens: int | None, rows: int | None) -> int | None:
    """Operations of a step.

    Args:
        counted: those of another step, and the tokens or rows that it was given.
        tokens, rows: that this one was given.
    """
    if counted is None:
        return None
    flops, given = counted
    return round(flops * (tokens or rows or given) / given) if given else flops


class InFull:
    """Which steps have a timeline: the third to fifth, every so-manieth, and fewer the more there are.

    Args:
        every: how manieth at first.
    """

    def __init__(self, every: int) -> None:
        self._every, self._so_far = every, 0

    def chosen(self, step: int) -> bool:
        """Is it one? Asked once for each, in their order."""
        if step not in _IN_FULL and step % self._every:
            return False
        self._so_far += 1
        if self._so_far % _TIMELINES == 0:
            self._every *= 2
        return True


_IN_FULL = (3, 4, 5)
_TIMELINES = 20  # then half as many
_SUMMED = ("steps", "micro_batches", "rows", "tokens", "flops")


def merged(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of several steps: sums, the mean loss, the most bytes, the last values."""
    first, last = lines[0], lines[-1]
    if len(lines) == 1:
        return first
    losses = [float(line["loss"]) for line in lines if line["loss"] is not None]
    values: dict[str, float] = {}
    for line in lines:
        values |= line["values"]
    return {
        **last,
        "start": first["start"],
        "loss": finite(sum(losses) / len(losses)) if losses else None,
        "values": values,
        "peak": [max(row) for row in zip(*(line["peak"] for line in lines), strict=True)],
        "clock": "device" if all(line["clock"] == "device" for line in lines) else "host",
        "counting": any(line["counting"] for line in lines),
        **{key: _sum([line[key] for line in lines]) for key in _SUMMED},
        **{key: _added([line[key] for line in lines]) for key in ("seconds", "waits", "sent")},
    }


def _sum(numbers: Sequence[Any]) -> Any:
    return None if any(n is None for n in numbers) else sum(numbers)


def _added(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            out[key] = out.get(key, 0) + value
    return out


def finite(value: float) -> Any:
    """A number, or its name where JSON lacks it."""
    if value != value:
        return "NaN"
    return value if abs(value) != float("inf") else ("Infinity" if value > 0 else "-Infinity")
