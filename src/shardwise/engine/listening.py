"""Which units are listened to: those whose forwards and backwards have to be noticed one by one.

Where values stay whole, nothing is to be done as a unit begins or ends to compute, but for one thing: to see in
backward that a message of reduces can go. Small units share a message, so the first of them in the order of backwards
is *heard*, and the others are *silent*: their modules have no hooks, and their backward counts as over with that of the
one before them in that order. What arrives later than that is reduced once more at the end of the backward, which all
ranks know of, and such a unit is heard from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from shardwise.engine.unit import Unit


def may_be_silent(unit: Unit, root: nn.Module) -> bool:
    """Has a unit nothing to do when its module runs?

    Some of its parameters are frozen: they may be told to train some day, and the next forward has to see that.
    """
    strategy = unit.strategy
    computes_as_it_is = strategy.param_dtype is None and not strategy.autocast
    keeps_activations = not strategy.activation_checkpointing and strategy.activation_offload == "device"
    return (
        unit.module is not root
        and not unit.released
        and unit.home is None
        and not unit.unwatched
        and all(b.grads.packed for b in unit.buckets)
        and computes_as_it_is
        and keeps_activations
    )


class Listening:
    """Who is heard, of one model.

    Args:
        hear: puts the hooks on the module of a unit that is heard from now on.

    Attributes:
        silent: by the index of a unit that is heard: those that are over when it is.
    """

    def __init__(self, hear: Callable[[Unit], None]) -> None:
        self.hear_one = hear
        self.silent: dict[int, list[Unit]] = {}

    def choose(self, messages: Iterable[Sequence[Unit]], others: Iterable[Unit], root: nn.Module) -> None:
        """Hear as few units as possible. Whoever was heard before still is.

        Args:
            messages: units whose reduces go together, in the order of backwards.
            others: the rest.
        """
        self.silent = {}
        for unit in others:
            self.hear_one(unit)
        for message in messages:
            with_it: list[Unit] | None = None
            for unit in message:
                if with_it is None or unit.heard or not may_be_silent(unit, root):
                    self.hear_one(unit)
                    with_it = self.silent.setdefault(unit.index, [])
                else:
                    with_it.append(unit)

    def hear(self, units: Iterable[Unit]) -> None:
        """These were not over when they seemed to be."""
        for unit in units:
            if not unit.heard:
                self.hear_one(unit)
                for mine in self.silent.values():
                    if unit in mine:
                        at = mine.index(unit)
                        self.silent[unit.index] = mine[at + 1 :]
                        del mine[at:]
                        break

    def label(self, unit: Unit) -> str:
        """What a report calls a unit that is heard, in backward."""
        silent = self.silent.get(unit.index)
        return f"{unit.label} to {silent[-1].label}" if silent else unit.label
