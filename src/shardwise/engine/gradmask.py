"""Which gradients there are on a rank, in a row of bytes that another rank can follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.engine.schedule import Engine

_GONE, _REDUCED, _WAITING, _NEVER = range(4)  # zeroed by the script; in p.grad; not reduced yet; none since then


def mask(engine: Engine) -> tuple[bytes, bool]:
    """How the gradient of each parameter is on this rank, and whether some wait for their reduce."""
    row = bytearray()
    for unit in engine.units:
        for b, i, p in unit.slots:
            if p.grad is None:
                row.append(_GONE if b.grads.valid[i] or b.grads.arrived[i] else _NEVER)
            else:
                row.append(_REDUCED if b.grads.valid[i] else _WAITING if b.grads.arrived[i] else _NEVER)
    return bytes(row), _WAITING in row


def take_mask(engine: Engine, found: tuple[bytes, bool]) -> None:
    """Zero what the other rank has zeroed. What waits here for a reduce that is still to come, stays."""
    row, waiting = found
    at = iter(row)
    for unit in engine.units:
        for b, i, p in unit.slots:
            theirs = next(at)
            if theirs == _REDUCED and p.grad is None:
                b.grads.show(i, p)
            elif theirs == _GONE or (theirs == _NEVER and not (waiting and b.grads.arrived[i])):
                p.grad = None
