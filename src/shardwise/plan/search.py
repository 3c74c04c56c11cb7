"""Which strategy is best: all that make sense, predicted, and put in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardwise.errors import PlanError, ShardwiseError, first_line
from shardwise.placement import Where
from shardwise.plan.candidates import candidates, least, why_not
from shardwise.plan.machine import Machine
from shardwise.plan.memory import extrapolate, peak
from shardwise.plan.pool import each
from shardwise.plan.prediction import Prediction, Steps, Training, conclude, run
from shardwise.plan.rates import Rates
from shardwise.strategy import Strategy

MOST_ROWS = 1024


@dataclass(frozen=True)
class Row:
    """One strategy of a plan.

    Attributes:
        found: what it needs and costs; ``None`` where ``why`` says enough.
        why: why it is out of the question, or not there.
        states: bytes of the device that its model states take at least.
    """

    strategy: Strategy
    found: Prediction | None
    why: str
    states: int

    @property
    def fits(self) -> bool:
        return self.found is not None and self.found.fits

    @property
    def speed(self) -> float:
        """Tokens per second of all ranks; 0 if it is not known."""
        timing = self.found.timing if self.found is not None else None
        return 0.0 if timing is None else timing.tokens_per_s or 1 / timing.seconds


@dataclass(frozen=True)
class Plan:
    """Strategies in order: those that fit first, the fastest of them in front.

    Attributes:
        training, machine: what was asked.
        rates: where times come from.
        rows: of all strategies.
    """

    training: Training
    machine: Machine
    rates: Rates
    rows: list[Row]

    @property
    def best(self) -> Prediction | None:
        """The fastest that fits."""
        return self.rows[0].found if self.rows and self.rows[0].fits else None


def search(
    training: Training,
    machine: Machine,
    rates: Rates,
    *,
    precision: str | None = "bf16",
    rows: int | None = None,
    batch: int | None = None,
    strategies: Sequence[Strategy] | None = None,
    every: bool = False,
    known: Sequence[Row] = (),
    told: Callable[[int, int], None] | None = None,
) -> Plan:
    """Predict every sensible strategy.

    Args:
        precision: see :func:`~shardwise.plan.candidates.candidates`.
        rows: of a micro-batch; by default as many as fit, a power of two.
        batch: rows of a step of all ranks; micro-batches and accumulation follow from it.
        strategies: these instead of every sensible one.
        every: also what is slower than something that fits without it: states and activations elsewhere.
        known: rows of an earlier search, whose strategies are not simulated again.
        told: called with how many are done, and how many there are.

    Raises:
        PlanError: ``batch`` cannot be divided.
        ShardwiseError: of the only strategy that was asked for.
    """
    world = machine.world
    if batch is not None and batch % world:
        raise PlanError(f"a batch of {batch} rows cannot be divided among {world} ranks", fix=f"a multiple of {world}")
    each_rank = None if batch is None else batch // world
    if each_rank is not None and rows is not None and each_rank % rows:
        raise PlanError(f"{each_rank} rows of a rank are not whole micro-batches of {rows}", fix="a divisor of them")
    groups = [list(strategies)] if strategies is not None else candidates(machine, training.optimizer, precision)
    subject = training.subject
    out: list[Row] = []
    before = {row.strategy: row for row in known}

    def one(strategy: Strategy) -> Prediction:
        return _best_rows(training, machine, strategy, rates, rows, each_rank, strategies is not None)

    if every:
        groups = [[strategy for group in groups for strategy in group]]
    for group in groups:
        left: dict[Strategy, int] = {}
        for strategy in group:
            if strategy in before:
                out.append(before[strategy])
                continue
            needs = least(strategy, machine, subject.parameters, subject.trainable, training.optimizer)
            why = why_not(needs, machine)
            if strategies is None and why:
                out.append(Row(strategy, None, why, needs[Where.DEVICE]))
            else:
                left[strategy] = needs[Where.DEVICE]
        for k, (strategy, result) in enumerate(zip(left, each(one, list(left)), strict=True)):
            if isinstance(result, ShardwiseError):
                if strategies is not None and len(strategies) == 1:
                    raise result
                out.append(Row(strategy, None, first_line(result), left[strategy]))
            else:
                out.append(Row(strategy, result, "", left[strategy]))
            if told is not None:
                told(k + 1, len(left))
        if any(row.fits for row in out):
            break
    out.sort(key=lambda row: (not row.fits, row.found is None, -row.speed, row.states))
    return Plan(training, machine, rates, out)


def _best_rows(
    training: Training, machine: Machine, strategy: Strategy, rates: Rates, rows: int | None, each_rank: int | None,
    evaluate: bool,
) -> Prediction:  # fmt: skip
    """With the micro-batch that was asked for, or the largest that fits."""
    small = None
    if rows is None:
        small = run(training.sized(1), machine, strategy, evaluate=evaluate)
        rows = largest(training, machine, strategy, small, each_rank)
    count = 1 if each_rank is None else max(1, each_rank // rows)
    one = training.sized(rows)
    steps = small if small is not None and rows == 1 else run(one, machine, strategy, evaluate=evaluate)
    if count == 1:
        return conclude(steps, one, machine, strategy, rates)
    several = training.sized(rows, count)
    return conclude(run(several, machine, strategy, evaluate=evaluate), several, machine, strategy, rates, steps)


def largest(
    training: Training, machine: Machine, strategy: Strategy, one: Steps | None = None, limit: int | None = None,
    *, exactly: bool = False,
) -> int:  # fmt: skip
    """The most rows of a micro-batch that fit; 1 if not even that does.

    Live bytes are linear in the rows, point by point. So two simulations show all others.

    Args:
        one: a simulation with one row, if there is one.
        limit: rows of a rank, which micro-batches must divide.
        exactly: any number; otherwise powers of two, or divisors of ``limit``.
    """
    most = MOST_ROWS if limit is None else limit
    first = one or run(training.sized(1), machine, strategy)
    second = run(training.sized(2), machine, strategy)
    low = extrapolate(first.profile, [(p, n) for _, p, n in first.more])
    high = extrapolate(second.profile, [(p, n) for _, p, n in second.more])
    base = conclude(first, training.sized(1), machine, strategy, None)

    def fits(rows: int) -> bool:
        points = extrapolate(low, [(high, rows - 1)])
        return base.with_peaks(peak(points), peak(points, host=True)).fits

    if limit is not None:
        choices = [r for r in range(1, most + 1) if limit % r == 0]
    elif exactly:
        choices = list(range(1, most + 1))
    else:
        choices = [2**k for k in range(most.bit_length()) if 2**k <= most]
    return max([r for r in choices if fits(r)], default=1)
