"""How long a step takes: its operations and transfers played through in the engine's own order.

One stream computes. A transfer runs beside it, on the link or disk that it needs, after those that were put there
before; who waits for it stands still until it has ended. That is all: what overlaps is what the engine lets overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwise.plan.play import COMPUTE, LAUNCH, Play
from shardwise.plan.rates import Rates
from shardwise.plan.trace import Trace

_MOST, _SAME = 12, 1e-6


@dataclass(frozen=True)
class Timing:
    """One step of one rank, in seconds.

    Attributes:
        seconds: from the begin of a step to that of the next.
        compute: what computes is busy, other things that slow it included.
        launch: it stands still since the host has not come so far.
        waits: it stands still for a transfer, by kind: ``network``, ``host link``, ``disk``; ``host``: for an update.
        busy: how long each kind of transfer is under way, hidden or not.
        phases: what a step consists of, by phase of the engine; the script's own parts have the name ``""``.
        bound: what is busy longest: a constant of :mod:`shardwise.plan.play`.
        tokens_per_s: of all ranks; ``None`` if the trace does not know.
        mfu: model FLOP/s over the device's peak; ``None`` if the trace does not know.
        sources: where the rates are from.
    """

    seconds: float
    compute: float
    launch: float
    waits: dict[str, float]
    busy: dict[str, float]
    phases: dict[str, float]
    bound: str
    tokens_per_s: float | None = None
    mfu: float | None = None
    sources: dict[str, str] = field(default_factory=dict)


def predict(trace: Trace, rates: Rates) -> Timing:
    """Play a step through twice: the second begins with what the first has under way, as steps do. Again, while more is
    left under way by each than by the one before: a step takes as long as the slowest disk, in the long run.

    Args:
        trace: one step. Of its facts ``tokens`` (of all ranks), ``model_flops`` (of one rank's step, without what is
            computed again) and ``dtype`` (of its matrix products) are used where they are there.

    Raises:
        InternalError: something waits for a transfer that nobody began.
    """
    play = Play(rates)
    play.run(trace.entries, strict=False)
    before = 0.0
    for _ in range(_MOST):
        play.begin_again()
        begun = play.now
        play.run(trace.entries, strict=True)
        seconds = play.now - begun
        if not play.under_way or abs(seconds - before) <= _SAME * seconds:
            break
        before = seconds
    return _timing(play, trace, rates)


def extended(base: Timing, more: Sequence[tuple[Timing, float]], trace: Trace, rates: Rates) -> Timing:
    """Of a step with more of some parts.

    Args:
        base: with the fewest.
        more: steps with one more of a part in turn, and how many more there are to be.
        trace: for its facts, which are those of the step with all.
    """

    def line(first: float, others: Sequence[float]) -> float:
        counts = [count for _, count in more]
        return max(0.0, first + sum(n * (other - first) for other, n in zip(others, counts, strict=True)))

    def lines(name: str) -> dict[str, float]:
        first, others = getattr(base, name), [getattr(other, name) for other, _ in more]
        keys = sorted({*first, *(key for other in others for key in other)})
        return {key: line(first.get(key, 0.0), [other.get(key, 0.0) for other in others]) for key in keys}

    compute = line(base.compute, [other.compute for other, _ in more])
    launch = line(base.launch, [other.launch for other, _ in more])
    waits = lines("waits")
    seconds = compute + launch + sum(waits.values())
    return _with_facts(seconds, compute, launch, waits, lines("busy"), lines("phases"), trace, rates)


def _timing(play: Play, trace: Trace, rates: Rates) -> Timing:
    seconds = play.compute + play.launch + sum(play.waits.values())
    return _with_facts(seconds, play.compute, play.launch, play.waits, play.busy, play.phases, trace, rates)


def _with_facts(
    seconds: float, compute: float, launch: float, waits: dict[str, float], busy: dict[str, float],
    phases: dict[str, float], trace: Trace, rates: Rates,
) -> Timing:  # fmt: skip
    facts, most = trace.facts, {COMPUTE: compute, LAUNCH: launch, **busy}
    bound = max(most, key=lambda name: most[name])
    tokens, flops = facts.get("tokens"), facts.get("model_flops")
    peak = rates.machine.peak(str(facts.get("dtype", "float32")))
    return Timing(
        seconds, compute, launch, waits, busy, phases, bound,
        tokens / seconds if tokens and seconds else None,
        flops / seconds / peak if flops and seconds else None,
        dict(rates.sources),
    )  # fmt: skip
