"""Which gradients there are on a rank, in a row of bytes that another rank can follow."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.engine.grad_states import GradState
from shardwise.engine.unit import Unit

_SHOWN = 16  # added to the state: ``p.grad`` shows it


def mask(units: Sequence[Unit]) -> bytes:
    """The state of each parameter's gradient on this rank, and whether ``p.grad`` shows it."""
    return bytes(s.bucket.grads.states[s.index] + _SHOWN * (s.param.grad is not None) for u in units for s in u.slots)


def take_mask(units: Sequence[Unit], row: bytes) -> None:
    """Zero what the other rank has zeroed. What waits here for a reduce that is still to come, stays."""
    waiting = any(byte >= _SHOWN and byte - _SHOWN == GradState.LOCAL for byte in row)
    at = iter(row)
    for unit in units:
        for slot in unit.slots:
            byte, grads, p = next(at), slot.bucket.grads, slot.param
            theirs = GradState(byte % _SHOWN)
            reduced = theirs in (GradState.REDUCED, GradState.ADDING)
            if byte >= _SHOWN and reduced:
                if p.grad is None:
                    grads.show(slot.index, p)
            elif byte >= _SHOWN and theirs is GradState.LOCAL:
                continue
            elif theirs is not GradState.NONE or not (waiting and grads.states.waits(slot.index)):
                p.grad = None  # zeroed there, or never made since
