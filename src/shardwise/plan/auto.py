"""``strategy="auto"``: the planner chooses, for the model and the machine at hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from shardwise import device as devices
from shardwise import host
from shardwise.comm import World, init
from shardwise.engine.build import device_of
from shardwise.errors import PlanError, RecordError, ShardwiseError
from shardwise.observe import recording
from shardwise.operations import broadcast_object_list
from shardwise.placement import Where
from shardwise.plan.calibrate import rates_here
from shardwise.plan.candidates import candidates, least, why_not
from shardwise.plan.given import subject_of
from shardwise.plan.machine import Machine
from shardwise.plan.optimizers import OPTIMIZERS
from shardwise.plan.pool import alone
from shardwise.plan.prediction import Training
from shardwise.plan.rates import Rates
from shardwise.plan.search import largest, search
from shardwise.plan.words import as_dict, next_better, verdict
from shardwise.sizes import format_bytes
from shardwise.strategy import Strategy

T = TypeVar("T")
_SPARE = 0.5
"""Of a device: what model states may take where nobody knows what activations will."""
_CHOSEN = ("preset", "shard_size", "offload_params", "offload_grads", "offload_optimizer", "activation_checkpointing",
           "activation_offload")  # fmt: skip
_PATIENCE_S = 600.0


class Chosen(NamedTuple):
    """What rank 0 found: the strategy as it is written, why, and its prediction, if one was made."""

    strategy: str
    why: str
    facts: dict[str, Any] | None = None


def choose(
    module: nn.Module,
    asked: Strategy,
    device: torch.device,
    example: Any = None,
    optimizers: Sequence[Optimizer] = (),
) -> Strategy:
    """The strategy to use for a model on this machine. A collective: rank 0 plans, and all ranks take its answer.

    Args:
        module: not sharded; is not changed.
        asked: ``auto``, with keys that are kept: ``auto,param_dtype=bf16``.
        device: where it will compute.
        example: inputs of one forward, see :func:`~shardwise.plan.given.subject_of`. Without them the choice is by
            model states alone, which may take half of a device.
        optimizers: what will update it; AdamW if nobody knows yet.

    Raises:
        PlanError: nothing fits; with the nearest. On every rank.
        RecordError: the run is recorded where its plan cannot be written. On every rank.

    Cost: some seconds to a minute on rank 0, in a process of its own.
    """
    world = init(device)
    chosen = _agreed(world, lambda: _kept(_planned(module, asked, device, example, optimizers, world)))
    if world.rank == 0:
        print(f"shardwise: strategy auto: {chosen.why}", file=sys.stderr, flush=True)
    return Strategy.parse(chosen.strategy)


def planned_batch_size(module: nn.Module, example: Any, strategy: str | Strategy | None = None) -> int:
    """Rows of the largest micro-batch that fits on this machine, by the planner: where
    :func:`shardwise.find_executable_batch_size` had better start. A collective: rank 0 plans.

    Args:
        module: not sharded; is not changed.
        example: inputs of one forward, with any number of rows: see :func:`~shardwise.plan.given.subject_of`.
        strategy: that the model will train under; ``zero3`` by default.

    Returns:
        1 at least: whether that fits only the run itself will show.

    Raises:
        PlanError: the model cannot run without values.
    """
    chosen = Strategy.parse(strategy)
    device = device_of(module)
    world = init(device)
    machine = _machine(module, device, world)
    return int(_agreed(world, lambda: alone(_most, module, chosen, machine, example, patience_s=_PATIENCE_S)))


def _most(module: nn.Module, strategy: Strategy, machine: Machine, example: Any) -> int:
    return largest(Training(subject_of(module, example)), machine, strategy, exactly=True)


def _planned(
    module: nn.Module,
    asked: Strategy,
    device: torch.device,
    example: Any,
    optimizers: Sequence[Optimizer],
    world: World,
) -> Chosen:
    machine = _machine(module, device, world)
    name = _name(optimizers)
    if example is None:
        return _by_states(module, asked, machine, name)
    return alone(_search, module, asked, machine, name, example, patience_s=_PATIENCE_S)


def _kept(chosen: Chosen) -> Chosen:
    """Where this run is recorded, its plan is kept for the report, beside what will be measured."""
    folder = recording.folder()
    if chosen.facts and folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "plan.json").write_text(json.dumps(chosen.facts), encoding="utf-8")
        except OSError as error:
            raise RecordError(
                f"the plan cannot be written: {error.strerror or error}", where=str(folder), fix="record elsewhere"
            ) from error
    return chosen


def _agreed(world: World, plan: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; what it raises, too."""
    answer: list[Any] = [None]
    if world.rank == 0:
        try:
            answer = [plan()]
        except ShardwiseError as error:
            answer = [error]
    if world.size > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], ShardwiseError):
        raise answer[0]
    return answer[0]


def _search(module: nn.Module, asked: Strategy, machine: Machine, optimizer: str, example: Any) -> Chosen:
    subject = subject_of(module, example)
    training = Training(subject, optimizer)
    rates = rates_here(machine) or Rates.of_sheet(machine)
    rows: list[Strategy] = []
    plan = None
    for group in candidates(machine, optimizer, None):
        rows += [_with(asked, row) for row in group]
        known = () if plan is None else plan.rows
        plan = search(training, machine, rates, rows=subject.batch, strategies=rows, known=known)
        if plan.best is not None:
            break
    assert plan is not None
    if plan.best is None:
        raise PlanError(f"{verdict(plan)} {_table(plan)}", fix="a smaller batch, or more devices: see 'shardwise plan'")
    more = next_better(plan)
    said = f"{verdict(plan)}{' ' + more if more else ''}"
    return Chosen(str(_with(asked, plan.best.strategy)), said, as_dict(plan.best))


def _table(plan: Any) -> str:
    rows = [row for row in plan.rows if row.found is not None][:6]
    return "; ".join(f"{row.strategy} needs {format_bytes(row.found.needs[1])}" for row in rows)


def _by_states(module: nn.Module, asked: Strategy, machine: Machine, optimizer: str) -> Chosen:
    """Without inputs: the simplest whose states leave half of a device for the rest."""
    parameters = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    part = replace(machine, memory=int(machine.memory * _SPARE))
    smallest = ""
    for group in candidates(machine, optimizer, None):
        for row in group:
            needs = least(row, machine, parameters, trainable, optimizer)
            if not why_not(needs, part):
                share = needs[Where.DEVICE] / machine.memory
                chosen = _with(asked, row)
                why = f"use {chosen}: its model states take {share:.0%} of a device. No example inputs were given, so "
                return Chosen(str(chosen), f"{why}activations are not counted, and {1 - _SPARE:.0%} is left for them.")
            smallest = why_not(needs, part)
    raise PlanError(f"nothing fits: {smallest}", fix="more devices, or more host memory: see 'shardwise plan'")


def _with(asked: Strategy, row: Strategy) -> Strategy:
    """A row of the search, with the keys that the script gave."""
    given = {
        f.name: getattr(asked, f.name)
        for f in fields(Strategy)
        if f.name != "preset" and getattr(asked, f.name) != f.default
    }
    layout = {"layout": row.layout} if row.layout != "element" else {}
    return Strategy(**{**{key: getattr(row, key) for key in _CHOSEN}, **layout, **given})


def _machine(module: nn.Module, device: torch.device, world: World) -> Machine:
    """The one at hand, with what is free on it: what this model takes now, it will not when it is sharded."""
    local = min(world.local_size, world.size)
    machine = Machine.here(local, device=None if device.type != "cpu" else "cpu")
    own = sum(p.numel() * p.element_size() for p in module.parameters() if p.device.type == device.type)
    told = devices.memory(device) if device.type != "cpu" else None
    free = host.memory()
    if told is not None:
        memory = min(told[1], told[0] + own)
    else:
        memory = machine.memory if free is None else min(machine.memory, free.free // local + own)
    return replace(machine, memory=memory, nodes=max(1, world.size // local))


def _name(optimizers: Sequence[Optimizer]) -> str:
    """What the planner calls an optimizer."""
    for optimizer in optimizers:
        name = type(optimizer).__name__.lower()
        if isinstance(optimizer, SGD) and any(group.get("momentum") for group in optimizer.param_groups):
            return "momentum"
        if name in OPTIMIZERS:
            return name
    return "adamw"
