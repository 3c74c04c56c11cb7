"""What crosses the wire, and counts of it. Bytes are exact; wait time is this rank's, blocked in ``wait()``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Number = int | Callable[[], int]
"""A tag, or what gives it when the first message that carries it is sent."""


@dataclass(frozen=True)
class Op:
    """What a transfer is, for counting and for reports: ``gather of unit 'blocks.3'``."""

    kind: str
    unit: str
    number: Number

    @property
    def tag(self) -> int:
        """What its messages carry, so that ranks that disagree about what comes next do not take one for another."""
        return self.number if isinstance(self.number, int) else self.number()

    def __str__(self) -> str:
        return f"{self.kind} of {self.unit}"


@dataclass
class CommCount:
    """Totals of one kind of operation on this rank."""

    calls: int = 0
    bytes_sent: int = 0
    wait_s: float = 0.0


@dataclass
class CommStats:
    """Totals per kind: ``gather`` and ``reduce`` of units, ``broadcast`` of initial values and
    buffers, ``norm`` for clipping, ``control`` for the small exchange that ends a backward."""

    kinds: dict[str, CommCount] = field(default_factory=dict)

    def of(self, kind: str) -> CommCount:
        count = self.kinds.get(kind)
        if count is None:
            count = self.kinds[kind] = CommCount()
        return count

    @property
    def bytes_sent(self) -> int:
        return sum(c.bytes_sent for c in self.kinds.values())

    def reset(self) -> None:
        self.kinds.clear()
