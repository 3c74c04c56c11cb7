"""Optimizer state that somebody still reads: whoever is about to change it in place waits until they have done.

A save in the background copies optimizer state after it has returned, beside the next forward and backward. Nothing but
an update changes that state, so updates ask here first: ``optimizer.step()`` of any torch optimizer (before anything
else in it), updates in the backward, and :func:`shardwise.optimizer_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

_waits: WeakKeyDictionary[Optimizer, list[Callable[[], object]]] = WeakKeyDictionary()


def read_beside(optimizer: Optimizer, wait: Callable[[], object]) -> None:
    """From now on, whoever wants to change the optimizer's state calls ``wait`` first.

    Args:
        wait: returns when the state may change, however the reading ended. Called by the thread that updates, until it
            has returned once.
    """
    _waits.setdefault(optimizer, []).append(wait)


def wait_for_readers(optimizer: Optimizer) -> None:
    """Before state is changed in place: wait for those who still read it. A look into a dict, if there is nobody."""
    waits = _waits.get(optimizer)
    if waits is None:
        return
    for wait in waits:
        wait()
    _waits.pop(optimizer, None)
