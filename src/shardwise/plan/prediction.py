"""What one strategy needs and costs, for one model on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from shardwise.plan.machine import ASSUMED, Band, Machine
from shardwise.plan.memory import Peak, Profile, extrapolate, peak, profile
from shardwise.plan.optimizers import optimizer
from shardwise.plan.planned_device import use_planned_device
from shardwise.plan.rates import Rates
from shardwise.plan.simulate import Simulated, Step, simulate
from shardwise.plan.subject import Subject
from shardwise.plan.timing import Timing, extended, predict
from shardwise.plan.trace import OP, Trace
from shardwise.strategy import Strategy

FEWEST = 5
"""Blocks of a kind in a simulation: the first three and the last two differ from those between them."""
LARGE = 1 << 28
"""Parameters of a model that is never simulated whole: what its units send together, a few MiB, is little there."""
_RESERVED = (0.02, 0.10)


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Args:
        subject: the model, with the rows of a micro-batch.
        optimizer: a name of :data:`~shardwise.plan.optimizers.OPTIMIZERS`.
        accumulation: micro-batches per step.
        clip: the norm that gradients are clipped to.
        dtype: of the parameters as they are built; theirs if ``None``.
    """

    subject: Subject
    optimizer: str = "adamw"
    accumulation: int = 1
    clip: float | None = 1.0
    dtype: torch.dtype | None = None

    def sized(self, rows: int, accumulation: int = 1) -> Training:
        """The same with micro-batches of ``rows``."""
        return replace(self, subject=self.subject.sized(rows), accumulation=accumulation)


@dataclass(frozen=True)
class Prediction:
    """One row of a plan. Bytes and seconds are of one rank.

    Attributes:
        rows, accumulation: of a micro-batch; micro-batches per step.
        device, host: the peaks of allocated bytes.
        between: bytes by state between two steps, on the device.
        save: bytes that a copy of the states for an asynchronous save takes on the host.
        disk: bytes on the disk.
        timing: of one step; ``None`` without rates.
        outside: bytes of the device that are not torch's.
        reserved: what torch's allocator holds beyond what is allocated.
        capacity, host_capacity, disk_capacity: of the machine, for one rank; ``None``: nobody said.
        evaluation: the peak of the device in a forward of evaluation; ``None``: nobody asked.
    """

    strategy: Strategy
    rows: int
    accumulation: int
    world: int
    device: Peak
    host: Peak
    between: Mapping[str, int]
    save: int
    disk: int
    timing: Timing | None
    outside: Band
    reserved: Band
    capacity: int
    host_capacity: int | None
    disk_capacity: int | None
    evaluation: Peak | None = None

    @property
    def needs(self) -> tuple[int, int]:
        """Bytes of the device, at least and at most."""
        low, high = (a + b for a, b in zip(self.outside[:2], self.reserved[:2], strict=True))
        return self.device.nbytes + low, self.device.nbytes + high

    @property
    def lacks(self) -> str:
        """What there is too little of: ``device``, ``host``, ``disk``, or nothing. By the upper ends."""
        if self.needs[1] > self.capacity:
            return "device"
        if self.host_capacity is not None and self.host.nbytes > self.host_capacity:
            return "host"
        return "disk" if self.disk_capacity is not None and self.disk > self.disk_capacity else ""

    @property
    def fits(self) -> bool:
        return not self.lacks

    def with_peaks(self, device: Peak, host: Peak) -> Prediction:
        """The same with other peaks."""
        return replace(self, device=device, host=host, reserved=_reserved(device, self.reserved.high == 0))


@dataclass(frozen=True)
class Steps:
    """Simulations of one step with a few blocks, from which that with all follows.

    Attributes:
        base: with the fewest.
        more: with one more of a kind in turn, and how many more there are to be.
        evaluation: live bytes of the forward of evaluation with all blocks, if it was asked for.
    """

    base: Simulated
    profile: Profile
    more: list[tuple[Simulated, Profile, float]]
    evaluation: Profile | None = None

    def line(self, of: dict[int, float]) -> float:
        """A number of each simulation (by ``id``), for all blocks."""
        first = of[id(self.base)]
        return first + sum(count * (of[id(other)] - first) for other, _, count in self.more)


def run(
    training: Training, machine: Machine, strategy: Strategy, *, whole: bool | None = None, evaluate: bool = False
) -> Steps:
    """Simulate what :func:`prediction` needs.

    Args:
        evaluate: and a forward of evaluation.
        whole: all blocks, instead of a few and lines between them. Slow for deep models; the same result. By default
            only for models below :data:`LARGE`, and where lines are not straight: units are so short that they send
            together, or parts of the optimizer state have different homes.
    """
    kinds = training.subject.kinds
    keep = {kind.name: kind.count if whole or kind.count <= FEWEST + 1 else FEWEST for kind in kinds}
    first = _simulate(training, machine, strategy, keep, evaluate)
    every = {kind.name: kind.count for kind in kinds}
    uneven = first.joins or 0 < strategy.offload_ratio < 1
    if whole is None and uneven and training.subject.parameters < LARGE and keep != every:
        keep = every
        first = _simulate(training, machine, strategy, keep, evaluate)
    fewest = _lengths(keep)
    same = {path: (n, n) for path, n in fewest.items()}
    base, evaluation = profile(first.segments, same), profile(first.evaluation, same)
    more, evaluations = [], []
    for kind in kinds:
        if keep[kind.name] == kind.count:
            continue
        one = {**keep, kind.name: keep[kind.name] + 1}
        found = _simulate(training, machine, strategy, one, evaluate)
        lengths, count = _lengths(one), float(kind.count - keep[kind.name])
        both = {path: (lengths[path], n) for path, n in fewest.items()}
        more.append((found, profile(found.segments, both), count))
        evaluations.append((profile(found.evaluation, both), count))
    return Steps(first, base, more, extrapolate(evaluation, evaluations) if evaluate else None)


def _lengths(keep: Mapping[str, int]) -> dict[str, int]:
    """How long each list of blocks is."""
    out: dict[str, int] = {}
    for name, count in keep.items():
        path = name.partition("#")[0]
        out[path] = out.get(path, 0) + count
    return out


def _simulate(
    training: Training, machine: Machine, strategy: Strategy, keep: Mapping[str, int], evaluate: bool
) -> Simulated:
    subject = training.subject
    device = torch.device("cpu") if machine.is_cpu else use_planned_device()
    return simulate(
        Step(
            lambda: subject.build(keep, device=device, dtype=training.dtype),
            lambda model: subject.loss(model, subject.inputs(device)),
            optimizer(training.optimizer),
            strategy,
            device,
            machine.world,
            machine.per_node,
            min(training.accumulation, 2),
            training.clip,
            evaluate,
        )
    )


def prediction(
    training: Training, machine: Machine, strategy: Strategy, rates: Rates | None = None, *, whole: bool | None = None
) -> Prediction:
    """What a strategy needs and costs.

    Args:
        rates: for the time; memory alone without.
        whole: see :func:`run`.

    Raises:
        ShardwiseError: the engine refuses the strategy for this model, or the model cannot run without values.
    """
    steps = run(training, machine, strategy, whole=whole)
    return conclude(steps, training, machine, strategy, rates)


def conclude(
    steps: Steps,
    training: Training,
    machine: Machine,
    strategy: Strategy,
    rates: Rates | None,
    single: Steps | None = None,
) -> Prediction:
    """From simulations to a row of a plan.

    Args:
        steps: of two micro-batches, if ``training`` has more than one. Each one after that takes what the second takes.
        single: of one, where ``steps`` are of two.
    """
    points = extrapolate(steps.profile, [(other, count) for _, other, count in steps.more])
    device, host = peak(points), peak(points, host=True)
    sims = [steps.base, *(one for one, _, _ in steps.more)]
    between = {
        state: round(steps.line({id(s): float(s.between.device[state]) for s in sims}))
        for state in steps.base.between.device
    }
    disk = round(steps.line({id(s): float(s.disk) for s in sims}))
    timing = None
    if rates is not None:
        timing = _timing(steps, training, machine, strategy, rates)
        if single is not None:
            one = _timing(single, training, machine, strategy, rates)
            facts = _facts(single, training, machine, strategy)
            timing = extended(one, [(timing, training.accumulation - 1.0)], facts, rates)
    return Prediction(
        strategy,
        training.subject.batch,
        training.accumulation,
        machine.world,
        device,
        host,
        between,
        between["parameters"] + between["optimizer"],
        disk,
        timing,
        machine.outside(2 if strategy.preset == "hsdp" else 1),
        _reserved(device, machine.is_cpu),
        machine.memory,
        None if machine.host_memory is None or machine.is_cpu else machine.host_memory // machine.per_node,
        None if machine.nvme_bytes is None else machine.nvme_bytes // machine.per_node,
        None if steps.evaluation is None else peak(steps.evaluation),
    )


def _reserved(device: Peak, nothing: bool) -> Band:
    if nothing:
        return Band(0, 0, "the heap of a CPU is shared")
    low, high = (round(part * device.nbytes) for part in _RESERVED)
    return Band(low, high, f"{ASSUMED}: blocks of torch's allocator that nothing fits into")


def _timing(steps: Steps, training: Training, machine: Machine, strategy: Strategy, rates: Rates) -> Timing:
    times = {id(s): predict(s.trace, rates) for s in (steps.base, *(one for one, _, _ in steps.more))}
    more = [(times[id(s)], count) for s, _, count in steps.more]
    return extended(times[id(steps.base)], more, _facts(steps, training, machine, strategy), rates)


def _facts(steps: Steps, training: Training, machine: Machine, strategy: Strategy) -> Trace:
    """What is known of a step with all blocks."""
    sims = [steps.base, *(one for one, _, _ in steps.more)]
    flops = steps.line({id(s): float(model_flops(s.trace)) for s in sims})
    micro_batches = steps.base.micro_batches
    facts = {
        "tokens": training.subject.tokens * training.accumulation * machine.world,
        "model_flops": flops / micro_batches * training.accumulation,
        "dtype": strategy.param_dtype or "fp32",
    }
    return Trace([], machine.world, facts)


def model_flops(trace: Trace) -> int:
    """Floating-point operations of a step, without the forwards that are computed again for their activations."""
    forward = again = total = 0
    before = True  # the first backward
    for entry in trace.entries:
        if entry.phase == "backward":
            before = False
        elif entry.phase == "step":
            before = True
        if entry.kind == OP and entry.op is not None:
            total += entry.op.flops
            if entry.phase == "forward":
                forward += entry.op.flops if before else 0
                again += 0 if before else entry.op.flops
    return total - again
