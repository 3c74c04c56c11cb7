"""Which pass is under way, and the forwards of units that it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from shardwise.engine.residency import Pin
from shardwise.engine.unit import Unit


class Passes:
    """What forward and backward know of each other.

    Attributes:
        forward: modules of the model that are running, one inside the other. 0: no forward is under way.
        backward: a backward is under way. Both at once: a recomputation, or a gradient taken inside a forward.
    """

    __slots__ = ("backward", "forward")

    def __init__(self) -> None:
        self.forward = 0
        self.backward = False

    @property
    def active(self) -> bool:
        return self.forward > 0 or self.backward

    def pin_for_access(self) -> Pin | None:
        """Inside a pass all ranks run the same code, so they read the same parameters; kept until it is over."""
        if not self.active:
            return None
        return Pin.BACKWARD if torch.is_grad_enabled() or self.backward else Pin.FORWARD


class Call:
    """One forward of a unit under autograd.

    Attributes:
        unit: whose.
        parent: the call that this one is inside of.
        since: autograd's sequence number when it began: what it computes has a higher one.
    """

    __slots__ = ("parent", "since", "unit")

    def __init__(self, unit: Unit, parent: Call | None) -> None:
        self.unit, self.parent = unit, parent
        self.since: int = torch._C._autograd._get_sequence_nr()

    def around(self) -> Iterator[Call]:
        """This call and those it is inside of."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


class UnitOrder:
    """The order units came in during the last pass, to guess the next one."""

    def __init__(self) -> None:
        self.last: list[Unit] = []
        self.now: list[Unit] = []

    def begin(self, guess: Sequence[Unit] | None = None) -> None:
        """A pass begins. ``guess``: its order, where no earlier pass has shown it."""
        if self.now:
            self.last = self.now
        elif guess is not None and not self.last:
            self.last = list(guess)
        self.now = []

    def after(self, unit: Unit, count: int) -> list[Unit]:
        """Note that ``unit`` came; return those expected next, at most ``count``."""
        at = len(self.now)
        self.now.append(unit)
        return self.expected(unit, count, at)

    def expected(self, unit: Unit, count: int, at: int = -1) -> list[Unit]:
        """Those expected next after a unit, at most ``count``.

        Args:
            at: how many came before it in this pass, if that is known: it may come several times.
        """
        last = self.last
        if not 0 <= at < len(last) or last[at] is not unit:
            if unit not in last:
                return []
            at = last.index(unit)
        return last[at + 1 : at + 1 + count]
