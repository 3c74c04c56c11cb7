"""One training step of the real engine on tensors without values, with as many ranks as one likes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from shardwise.comm import joined
from shardwise.comm.planned import planned
from shardwise.engine.build import no_sync, require_engine, shard
from shardwise.engine.clip import clip_grad_norm_
from shardwise.engine.optimizer import attach
from shardwise.errors import PlanError
from shardwise.events import listening
from shardwise.observe.live import Live
from shardwise.plan.kernels import as_on
from shardwise.plan.recorder import Recorder, Segment
from shardwise.plan.trace import Trace
from shardwise.strategy import Strategy
from shardwise.tiers import Ledger
from shardwise.tiers.planned_disk import PlannedDisk

BuildOptimizers = Callable[[list[nn.Parameter]], list[Optimizer]]


@dataclass(frozen=True)
class Step:
    """What is simulated.

    Args:
        build: makes the model, without values, on the CPU or on :attr:`device`.
        loss: runs a forward of one micro-batch and returns the loss; its inputs are made inside.
        optimizers: makes what updates the parameters that need gradients.
        strategy: how the model is sharded.
        device: where it computes: a planned device, an accelerator, or the CPU.
        world, local: ranks, and those of one host.
        accumulation: micro-batches per step.
        clip: gradients are clipped to this norm.
        evaluate: a forward of evaluation follows.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], torch.Tensor]
    optimizers: BuildOptimizers
    strategy: Strategy
    device: torch.device
    world: int = 1
    local: int = 1
    accumulation: int = 1
    clip: float | None = None
    evaluate: bool = False


@dataclass(frozen=True)
class Simulated:
    """What a step has done.

    Attributes:
        trace: its operations and transfers.
        segments: live bytes, from turn to turn; those of the first step, which makes the optimizer's state, come first.
        disk: bytes on this rank's disk.
        between: what is live between two steps.
        units: names, in the order of registration.
        parameters, trainable: elements of the whole model.
        micro_batches: of the step.
        evaluation: live bytes of a forward in evaluation after them, if it was asked for.
        joins: some units are so short that what they send may travel with that of others: how much waits for company
            does not grow evenly with their number.
    """

    trace: Trace
    segments: list[Segment]
    disk: int
    between: Live
    units: list[str]
    parameters: int
    trainable: int
    micro_batches: int
    evaluation: list[Segment]
    joins: bool


def simulate(step: Step) -> Simulated:
    """Run two or three steps and record the last.

    Raises:
        ShardwiseError: what the engine refuses, it refuses here too.
    """
    mode = _WithoutValues(allow_non_fake_inputs=True)
    one_thread = torch.autograd.set_multithreading_enabled(False)  # the modes of this thread see all of backward
    ranks = planned(step.device, step.world, step.local)
    with mode, ranks, _defaults_of_plain_tensors(), one_thread, as_on(step.device):
        model = step.build()
        parameters = sum(p.numel() for p in model.parameters())
        trainable = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trainable)
        if not count:
            raise PlanError("the model has no parameter that is trained", fix="let some require gradients")
        shard(model, step.strategy)
        optimizers = step.optimizers(trainable)
        for optimizer in optimizers:
            attach(optimizer)  # before the first backward, which may update
        engine = require_engine(model)
        segments: list[Segment] = []
        put_off: list[bool] = []
        for again in (False, True, True):
            recorder = Recorder(engine.ledger, step.device, operations=again)
            with listening(recorder, alone=True), recorder:
                one_step(step, model, optimizers)
            segments += recorder.segments
            put_off.append(any(unit.updates for unit in engine.units))
            # The first step makes the optimizer's state, and so puts no update off. Where others do, the step to know
            # is one whose forward waits for the updates of the step before it.
            if again and put_off[-2] == put_off[-1]:
                break
        homes = {id(u.home): u.home for u in engine.units if u.home is not None}.values()
        disk = sum(home.disk.nbytes for home in homes if isinstance(home.disk, PlannedDisk))
        units = [unit.label for unit in engine.units]
        between = recorder.now()
        short = [u.label for u in engine.units if u.joins or 0 < u.wire_bytes < joined.JOINED_BYTES]
        trace = Trace(recorder.entries, step.world, calls=recorder.calls)
        evaluation = _evaluation(step, model, engine.ledger) if step.evaluate else []
        for unit in engine.units:
            unit.finish_transfers()
    joins = step.world > 1 and len(short) > 1
    return Simulated(trace, segments, disk, between, units, parameters, count, step.accumulation, evaluation, joins)


def _evaluation(step: Step, model: nn.Module, ledger: Ledger) -> list[Segment]:
    """A forward of as many rows as a micro-batch has."""
    recorder = Recorder(ledger, step.device, operations=False)
    model.eval()
    with listening(recorder, alone=True), recorder, torch.no_grad():
        step.loss(model)
    model.train()
    return recorder.segments


def one_step(step: Step, model: nn.Module, optimizers: list[Optimizer]) -> None:
    """A step as scripts write it. Where gradients stay whole, only the last micro-batch reduces them."""
    for micro in range(step.accumulation):
        waits = micro + 1 < step.accumulation and not step.strategy.split_grads
        with no_sync(model) if waits else nullcontext():
            _backward(step.loss(model))
    if step.clip is not None:
        clip_grad_norm_(model, step.clip)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def _backward(loss: torch.Tensor) -> None:
    """As ``loss.backward()``, which would leave the modes for functions meanwhile: what it computes again is to run as
    it ran in the forward."""
    if not loss.requires_grad:
        raise PlanError("the loss depends on nothing that is trained")
    start = torch.ones_like(loss)
    _engine_run_backward((loss,), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True)


class _WithoutValues(FakeTensorMode):
    """Does not keep storages alive: torch's cache of results has them in its keys."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(a, torch.UntypedStorage) for a in args):
            before, self.cache_enabled = self.cache_enabled, False
            try:
                return super().dispatch(func, types, args, kwargs)
            finally:
                self.cache_enabled = before
        return super().dispatch(func, types, args, kwargs)


@contextmanager
def _defaults_of_plain_tensors() -> Iterator[None]:
    """Optimizers and models choose what they do as they would for tensors with values.

    Of ours, torch's optimizers would step one by one, and transformers would make masks that it does without.
    """
    supported: list[Any] = torch_optimizer._foreach_supported_types
    supported.append(FakeTensor)
    asked = sys.modules.get("transformers.utils.import_utils")
    is_fake = getattr(asked, "is_fake_tensor", None)
    if is_fake is not None:
        asked.is_fake_tensor = lambda tensor: False  # type: ignore[union-attr]
    try:
        yield
    finally:
        supported.remove(FakeTensor)
        if is_fake is not None:
            asked.is_fake_tensor = is_fake  # type: ignore[union-attr]
