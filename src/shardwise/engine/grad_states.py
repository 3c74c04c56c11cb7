"""Where the gradients of a bucket are. No torch here.

Each parameter's gradient is in one state::

    NONE ── arrives ──> LOCAL ── reduce ──> REDUCED ── update in the backward ──> SPENT
                          REDUCED ── arrives ──> ADDING ── reduce ──> REDUCED
                          LOCAL, ADDING ── a backward failed ──> LOST
    any of them ── zeroed ──> NONE
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from shardwise.errors import InternalError


class GradState(IntEnum):
    """Where the gradient of one parameter is on this rank."""

    NONE = 0  # there is none, or it was zeroed
    LOCAL = 1  # it arrived here, and has not been reduced over the ranks
    REDUCED = 2  # it is reduced; zero if it arrived on no rank
    ADDING = 3  # one is reduced, and more arrived here that is not
    SPENT = 4  # an update in the backward has used it up, and it was not zeroed since
    LOST = 5  # it waited for a reduce when a backward failed that was to add to it, and it was not zeroed since


_G = GradState
_TABLE: dict[GradState, frozenset[GradState]] = {
    _G.NONE: frozenset({_G.NONE, _G.LOCAL, _G.REDUCED}),
    _G.LOCAL: frozenset({_G.LOCAL, _G.REDUCED, _G.NONE}),
    _G.REDUCED: frozenset({_G.REDUCED, _G.ADDING, _G.SPENT, _G.NONE}),
    _G.ADDING: frozenset({_G.ADDING, _G.REDUCED, _G.NONE}),
    _G.SPENT: frozenset({_G.SPENT, _G.NONE}),
    _G.LOST: frozenset({_G.REDUCED, _G.NONE}),  # REDUCED: the script puts another one in its place
}
_ALLOWED = [[after in _TABLE[before] for after in GradState] for before in GradState]  # asked for each gradient


class GradStates:
    """The states of a bucket's gradients, with the transitions that are allowed. No torch in it."""

    __slots__ = ("label", "states")

    def __init__(self, count: int, label: str = "") -> None:
        self.label = label
        self.states = [GradState.NONE] * count

    def __getitem__(self, index: int) -> GradState:
        return self.states[index]

    def to(self, index: int, state: GradState) -> None:
        """Gradient ``index`` is in ``state`` from here on.

        Raises:
            InternalError: the table does not allow it.
        """
        if not _ALLOWED[self.states[index]][state]:
            raise InternalError(
                f"gradient {index} cannot go from {self.states[index].name} to {state.name}",
                where=f"unit {self.label}",
            )
        self.states[index] = state

    def arrive(self, index: int) -> bool:
        """One more arrived. Is it the first since the last reduce?"""
        now = self.states[index]
        if now is _G.NONE:
            self.states[index] = _G.LOCAL
            return True
        self.to(index, _G.ADDING if now in (_G.REDUCED, _G.ADDING) else _G.LOCAL)
        return now in (_G.NONE, _G.REDUCED)

    def all_arrived(self) -> None:
        """One of each arrived, and there was none."""
        self.states = [_G.LOCAL] * len(self.states)

    def all_came(self) -> None:
        """Each is reduced, and there was none."""
        self.states = [_G.REDUCED] * len(self.states)

    def waits(self, index: int) -> bool:
        """Does something of it wait for a reduce?"""
        return self.states[index] in (_G.LOCAL, _G.ADDING)

    def is_reduced(self, index: int) -> bool:
        """Is there a reduced part of it?"""
        return self.states[index] in (_G.REDUCED, _G.ADDING)

    @property
    def any_waits(self) -> bool:
        return _G.LOCAL in self.states or _G.ADDING in self.states

    @property
    def any_reduced(self) -> bool:
        return _G.REDUCED in self.states or _G.ADDING in self.states

    def all_are(self, state: GradState) -> bool:
        """Are all of them in one state?"""
        return self.states.count(state) == len(self.states)

    def zeroed(self) -> None:
        """The script has zeroed all of them."""
        self.states = [_G.NONE] * len(self.states)

    def reduced(self) -> None:
        """The bucket was reduced as a whole: what arrived nowhere counts as zero."""
        if self.all_are(_G.NONE) or self.all_are(_G.LOCAL):
            self.states = [_G.REDUCED] * len(self.states)
            return
        for i in range(len(self.states)):
            self.to(i, _G.REDUCED)

    def taken(self) -> None:
        """What waited was taken into a reduce that is under way, and may still fail."""
        if self.all_are(_G.LOCAL):
            self.zeroed()
            return
        for i, s in enumerate(self.states):
            if s is _G.LOCAL:
                self.states[i] = _G.NONE
            elif s is _G.ADDING:
                self.states[i] = _G.REDUCED

    def lose(self, waited: Sequence[bool]) -> None:
        """What waited is gone. Of those that ``waited`` before this backward, something is missing now."""
        self.taken()
        for i, missing in enumerate(waited):
            if missing:
                self.states[i] = _G.LOST

    def spend(self) -> None:
        """An update has used them up."""
        for i in range(len(self.states)):
            self.to(i, _G.SPENT)
