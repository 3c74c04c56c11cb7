"""Where a unit's values are: one state, a table of the transitions that are allowed, and counted reasons to stay.

::

    RELEASED ── stage ──> STAGING ── gather ──> GATHERING ── wait ──> GATHERED ── release ──> RELEASED
        any of them ── an update is asked for ──> UPDATING ── it has taken place ──> RELEASED or GATHERED
        any of them ── an update failed, values were loaded in part ──> FAILED ── a complete load ──> as before

A transition that the table does not have is a fault of the engine: it raises at once, with the last transitions of
the unit, where it would otherwise show as a wrong number some steps later.

No torch here, so that all of it is tested without a model.
"""

from __future__ import annotations

from collections import Counter, deque
from enum import Enum

from shardwise.errors import InternalError


class Residency(Enum):
    """Where the values of a unit are."""

    RELEASED = "released"  # their bytes are free; this rank has its shards, at their home
    STAGING = "staging"  # shards are on their way from their home, ahead of the gather
    GATHERING = "gathering"  # on their way from the other ranks
    GATHERED = "gathered"  # here, and equal to the master values
    UPDATING = "updating"  # an update was asked for and not waited for
    FAILED = "failed"  # not those of any step: see the unit's ``failure``


class Pin(Enum):
    """Why a unit's values must not be released."""

    FORWARD = "a forward that has not ended"
    BACKWARD = "a backward that has not ended, or is still to come"
    READING = "a block of gathered()"
    WRITING = "a block of gathered(write=True)"
    USER = "unshard()"
    STATE_DICT = "a state dict being loaded"


_R = Residency
_ALLOWED: dict[Residency, frozenset[Residency]] = {
    _R.RELEASED: frozenset({_R.STAGING, _R.GATHERING, _R.UPDATING, _R.FAILED}),
    _R.STAGING: frozenset({_R.GATHERING, _R.RELEASED, _R.FAILED}),
    _R.GATHERING: frozenset({_R.GATHERED, _R.FAILED}),
    # GATHERING: whole values follow the master values after a step.
    _R.GATHERED: frozenset({_R.RELEASED, _R.GATHERING, _R.UPDATING, _R.FAILED}),
    _R.UPDATING: frozenset({_R.RELEASED, _R.GATHERED, _R.FAILED}),
    _R.FAILED: frozenset({_R.RELEASED, _R.GATHERED}),
}
_HISTORY = 12


class Residence:
    """The state of one unit's values.

    Args:
        label: the unit, for reports.
        released: do its values come and go? Otherwise RELEASED is never allowed.
    """

    __slots__ = ("_history", "_pins", "label", "released", "state")

    def __init__(self, label: str, *, released: bool) -> None:
        self.label, self.released = label, released
        self.state = Residency.GATHERED  # as the unit is made, its values are in place
        self._pins: Counter[Pin] = Counter()
        self._history: deque[Residency] = deque([self.state], maxlen=_HISTORY)

    def to(self, state: Residency) -> None:
        """Be in ``state`` from here on.

        Raises:
            InternalError: the table does not allow it.
        """
        if state not in _ALLOWED[self.state] or (state is Residency.RELEASED and not self.released):
            raise InternalError(
                f"a unit cannot go from {self.state.value} to {state.value}",
                where=f"unit {self.label}, before that: {self.history}",
            )
        self.state = state
        self._history.append(state)

    @property
    def history(self) -> str:
        """The last states, oldest first."""
        return " > ".join(s.value for s in self._history)

    @property
    def here(self) -> bool:
        """Can the values be read?"""
        return self.state is Residency.GATHERED

    @property
    def coming(self) -> bool:
        """Are the values here, or on their way from the other ranks?"""
        return self.state in (Residency.GATHERED, Residency.GATHERING)

    @property
    def staging(self) -> bool:
        """Are its shards on their way from their home?"""
        return self.state is Residency.STAGING

    # --- pins -----------------------------------------------------------------------------------
    def pin(self, reason: Pin) -> None:
        """One more who needs the values."""
        self._pins[reason] += 1

    def unpin(self, reason: Pin) -> None:
        """One fewer.

        Raises:
            InternalError: nobody had them pinned for this.
        """
        if not self._pins[reason]:
            raise InternalError(f"values are let go that nobody held for {reason.value}", where=f"unit {self.label}")
        self._pins[reason] -= 1

    def drop(self, reason: Pin) -> None:
        """Nobody needs them for this reason any more, however many did."""
        self._pins.pop(reason, None)

    def pinned(self, reason: Pin | None = None) -> int:
        """How many need the values: for ``reason``, or at all."""
        return self._pins[reason] if reason is not None else sum(self._pins.values())
