"""What one training step does, in the order in which it is done: the engine's own, recorded from a run without values.

A trace is a list of :class:`Entry`: operations, transfers that begin, waits for them, and turns to another unit. Live
bytes stand beside each entry. Memory and time are both read off it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shardwise.plan.calls import Call

OP, START, WAIT, PHASE = "op", "start", "wait", "phase"
"""Kinds of entries."""
RECOMPUTE = "recompute"
"""The phase of operations that checkpointing does again in a backward."""


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Attributes:
        name: as torch names it: ``aten::mm``.
        shapes, dtypes: of its tensor arguments, in their order; lists of tensors are laid flat.
        rest: other arguments, as text.
        device: where it computes: ``device`` or ``host``.
        flops: floating-point operations, as ``torch.utils.flop_counter`` counts them (a multiply-add is two).
        read, written: bytes of its arguments and of its results; 0 for views.
        cold: ``1`` for each tensor argument that nothing has touched for long, so that no cache has it, else ``0``.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    rest: str
    device: str
    flops: int
    read: int
    written: int
    cold: str = ""


@dataclass(frozen=True)
class Entry:
    """Something that happens.

    Attributes:
        kind: one of the constants of this module.
        op: of ``op``.
        way, name, nbytes, ranks: of ``start`` and ``wait``: see :class:`shardwise.events.Listener`.
        phase, unit: what this rank is at; of ``phase``: what it turns to.
    """

    kind: str
    phase: str
    unit: str
    op: Operation | None = None
    way: str = ""
    name: str = ""
    nbytes: int = 0
    ranks: tuple[int, ...] = ()


@dataclass
class Trace:
    """One step of one rank.

    Attributes:
        entries: in their order.
        world: ranks.
        facts: what else is known of the step: tokens, rows, parameters, ...
        calls: how each operation was called, to make it again where it is measured.
    """

    entries: list[Entry]
    world: int
    facts: dict[str, Any] = field(default_factory=dict)
    calls: dict[Operation, Call] = field(default_factory=dict)
