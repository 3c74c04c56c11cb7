"""Seconds as a function of an amount: of bytes, or of floating-point operations. More never takes less time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log
from typing import Protocol


class Curve(Protocol):
    """What tells how long an amount takes."""

    def at(self, amount: float) -> float: ...


@dataclass(frozen=True)
class Line:
    """``overhead`` seconds, and then so much per second."""

    overhead: float
    rate: float

    def at(self, amount: float) -> float:
        return self.overhead + amount / self.rate


@dataclass(frozen=True)
class Points:
    """Between measured points; as the first one below them, at the rate of the last one above.

    Args:
        points: (amount, seconds), both above 0, by amount; none takes less than one before it. See :meth:`of`.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, measured: Iterable[tuple[float, float]]) -> Points:
        """From measurements in any order, which may be noisy: a larger amount takes at least as long as a smaller."""
        out: list[tuple[float, float]] = []
        for amount, seconds in sorted(measured):
            least = max(seconds, out[-1][1] if out else 1e-9)
            if out and out[-1][0] == amount:
                out[-1] = (amount, least)
            else:
                out.append((amount, least))
        return cls(tuple(out))

    def at(self, amount: float) -> float:
        points = self.points
        first, last = points[0], points[-1]
        if amount <= first[0]:
            return first[1]
        if amount >= last[0]:
            return last[1] * (amount / last[0])
        after = bisect_left(points, (amount, 0.0))
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        share = (log(amount) - log(x0)) / (log(x1) - log(x0))
        return exp(log(y0) + share * (log(y1) - log(y0)))
