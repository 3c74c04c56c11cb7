"""How far one can go: the largest micro-batch, the longest rows, the deepest model that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shardwise.errors import PlanError
from shardwise.plan.machine import Machine
from shardwise.plan.memory import extrapolate, peak
from shardwise.plan.prediction import FEWEST, Training, conclude, run
from shardwise.plan.search import largest
from shardwise.strategy import Strategy

STEP = 128
"""Tokens: lengths are looked for in multiples of it."""
LONGEST = 1 << 22


def most_rows(training: Training, machine: Machine, strategy: Strategy) -> int:
    """Rows of the largest micro-batch that fits; 0 if not even one row does."""
    found = largest(training, machine, strategy, exactly=True)
    return found if found > 1 or _fits(training.sized(1), machine, strategy) else 0


def most_tokens(
    sized: Callable[[int], Training], machine: Machine, strategy: Strategy, limit: int | None = None
) -> int:
    """Tokens of the longest rows that fit, in multiples of :data:`STEP`; 0 if not even so many do.

    Memory grows with the length as it likes, so each length is simulated: first doubling it, then halving what is left.

    Args:
        sized: what is trained, with rows of a length.
        limit: that the model itself has.
    """
    most = min(limit or LONGEST, LONGEST)
    low, high = 0, STEP
    while high <= most and _fits(sized(high), machine, strategy):
        low, high = high, high * 2
    if low == 0:
        return 0
    high = min(high, most + STEP)
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        if _fits(sized(middle), machine, strategy):
            low = middle
        else:
            high = middle
    return low


def most_blocks(training: Training, machine: Machine, strategy: Strategy) -> tuple[int, int]:
    """Blocks of the deepest model that fits, made of more of the blocks of which this one has the most, and its
    parameters. Live bytes are linear in the number of blocks, so no other depth is simulated.

    Returns:
        0 and 0 if not even the fewest fit.

    Raises:
        PlanError: too few blocks are alike to tell what one more adds.
    """
    steps = run(training, machine, strategy, whole=False)
    if not steps.more:
        raise PlanError(
            f"what one more block adds shows in a model of more than {FEWEST + 1} that are alike",
            where=training.subject.name,
            fix="ask about a deeper model of the same blocks",
        )
    index = max(range(len(steps.more)), key=lambda k: steps.more[k][2])
    base = conclude(steps, training, machine, strategy, None)
    count = max(kind.count for kind in training.subject.kinds)

    def fits(blocks: int) -> bool:
        more = [(p, n + (blocks - count if k == index else 0)) for k, (_, p, n) in enumerate(steps.more)]
        points = extrapolate(steps.profile, more)
        return base.with_peaks(peak(points), peak(points, host=True)).fits

    low, high = 0, max(count, 8)
    while fits(high) and high < 1 << 16:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    one = steps.more[index][0].parameters - steps.base.parameters
    return low, training.subject.parameters + (low - count) * one if low else 0


def _fits(training: Training, machine: Machine, strategy: Strategy) -> bool:
    return conclude(run(training, machine, strategy), training, machine, strategy, None).fits


def longer(training: Training, seq: int) -> Training:
    """The same with rows of another length."""
    subject = training.subject
    return replace(training, subject=replace(subject, seq=seq, maker=subject.maker.sized(subject.batch, seq)))
