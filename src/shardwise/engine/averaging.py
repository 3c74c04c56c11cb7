"""Moving averages of sharded models, taken on master values."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.engine.state_dict import let_follow
from shardwise.engine.unit import Unit, unit_of
from shardwise.errors import UnitError


@torch.no_grad()
def ema_update_(mean: nn.Module, model: nn.Module, decay: float = 0.999) -> None:
    """``mean = decay * mean + (1 - decay) * model``: one step of an exponential moving average of a model's values.

    It is taken on the master values, so that a model that computes in bf16 has an average in fp32, where a small step
    is not rounded away. Each rank updates what it holds; nothing is gathered. Buffers are copied.

    Args:
        mean: ``copy.deepcopy(model)``, taken after the model was sharded.
        model: a sharded model.
        decay: the part of the average that stays.

    Raises:
        UnitError: one of them is not sharded, or they are not sharded alike.

    Cost: reads and writes each rank's part of the values once; parameters that stay whole while optimizer state is
    split are gathered once, as after a step.
    """
    pairs = _pairs(mean, model)
    for ours, theirs in pairs:
        ours.reconcile()
        theirs.reconcile()
        for a, b in zip(ours.buckets, theirs.buckets, strict=True):
            with a.master_here(write=True) as into, b.master_here() as values:
                if into.is_floating_point() or into.is_complex():
                    into.lerp_(values, 1.0 - decay)
                else:
                    into.copy_(values)
    for ours, _ in pairs:
        let_follow(ours)
        ours.publish(ours.buckets)
    for kept, now in zip(mean.buffers(), model.buffers(), strict=True):
        kept.copy_(now)


def _pairs(mean: nn.Module, model: nn.Module) -> list[tuple[Unit, Unit]]:
    pairs: dict[int, tuple[Unit, Unit]] = {}
    ours, theirs = list(mean.parameters()), list(model.parameters())
    for a, b in zip(ours, theirs, strict=False):
        of, other = unit_of(a), unit_of(b)
        if of is not None and other is not None:
            pairs[id(of)] = of, other
    alike = len(ours) == len(theirs) and pairs and all(_layouts(x) == _layouts(y) for x, y in pairs.values())
    if not alike or any(unit_of(p) is None for p in (*ours, *theirs)):
        raise UnitError(
            f"{type(mean).__name__} and {type(model).__name__} are not sharded alike",
            fix="mean = copy.deepcopy(model), once the model is sharded",
        )
    return list(pairs.values())


def _layouts(unit: Unit) -> list[object]:
    return [(b.layout.slots, b.layout.parts, b.held, b.master_dtype) for b in unit.buckets]
