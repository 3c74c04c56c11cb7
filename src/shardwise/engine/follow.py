"""What a rank without data does for those that have some: one rule per event. See :mod:`shardwise.engine.join`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from shardwise.engine import clip, norms, sharded_grad
from shardwise.engine.bucket import Bucket
from shardwise.engine.gradmask import mask, take_mask
from shardwise.engine.schedule import Engine, Sequence_

if TYPE_CHECKING:
    from shardwise.engine.join import Join


# --- state that a follower takes over --------------------------------------------------------------
def summary(engine: Engine) -> Any:
    """What all ranks know alike in training without followers: learned orders, and which gradients there are."""
    orders = [
        ([u.index for u in s.last], [u.index for u in s.now]) for s in (engine._forward, engine._eval, engine._backward)
    ]
    return orders, list(engine._order), engine.gather_log, mask(engine)


def take_summary(engine: Engine, found: Any) -> None:
    orders, engine._order, engine.gather_log, gradients = found
    sequences: list[Sequence_] = [engine._forward, engine._eval, engine._backward]
    for sequence, (last, now) in zip(sequences, orders, strict=True):
        sequence.last, sequence.now = [engine.units[i] for i in last], [engine.units[i] for i in now]
    take_mask(engine, gradients)


def take_settings(optimizers: Sequence[Optimizer], settings: dict[int, Any]) -> None:
    for k, groups in settings.items():
        for group, values in zip(optimizers[k].param_groups, groups, strict=True):
            group.update(values)


def holds(engine: Engine, optimizer: Optimizer) -> bool:
    return any(
        (unit := getattr(p, "_shardwise_unit", None)) is not None and unit.engine is engine
        for group in optimizer.param_groups
        for p in group["params"]
    )


def release(engine: Engine) -> None:
    """Free gathered values, also those that were kept for a pass to come."""
    for unit in engine.units:
        unit.kept_for -= {"forward", "backward"}
        unit.release()


def rest(engine: Engine) -> None:
    """Between two passes, the same on every rank."""
    engine.forward_active = False
    release(engine)


def whole(engine: Engine) -> list[Bucket]:
    """Buckets whose ``p.grad`` are plain tensors."""
    return [b for u in engine.units for b in u.buckets if not b.split_optimizer and not b.grads.on_host]


def adopt(bucket: Bucket) -> None:
    """Take over gradients that were put into ``p.grad`` by hand."""
    for i, p in enumerate(bucket.params):
        if p.grad is not None and not bucket.grads.spent[i] and not bucket.grads.is_shown(i, p.grad):
            bucket.grads.adopt(i, p.grad)
            bucket.grads.show(i, p)


# --- rules ---------------------------------------------------------------------------------------
def _gather(join: Join, engine: Engine, index: int) -> None:
    unit = engine.units[index]
    unit.kept_for -= {"forward", "backward"}
    unit.release()
    unit.gather()
    unit.release()


def _buffers(join: Join, engine: Engine) -> None:
    engine.send_buffers(join.leader)


def _backward(join: Join, engine: Engine, gradients: tuple[bytes, bool], settings: dict[int, Any]) -> None:
    take_mask(engine, gradients)
    take_settings(join.optimizers, settings)
    engine.start_backward()
    for unit in engine.units:
        unit.begin_backward(engine.backward_id)


def _launch(join: Join, engine: Engine, index: int) -> None:
    engine._next += 1  # the order is the same on all ranks
    engine._launch(engine.units[index])


def _backward_ends(join: Join, engine: Engine, gather_log: int) -> None:
    engine.gather_log = gather_log
    sync, engine.sync = engine.sync, True
    try:
        engine._end_backward()
    finally:
        engine.sync = sync


def _abandon(join: Join, engine: Engine) -> None:
    engine._abandon_backward()


def _scale(join: Join, engine: Engine, factor: float) -> None:
    engine.scale_grads(factor)


def _grads(join: Join, engine: Engine, place: int) -> None:
    join.take_grads(engine, place)


def _norms(join: Join, engine: None, places: Any, norm_type: float) -> None:
    norms.per_shard(*clip.settled(join.params(places)), norm_type)


def _multiply(join: Join, engine: None, places: Any, factor: torch.Tensor) -> None:
    spreads, plain = clip.settled(join.params(places))
    clip.multiply_(clip.pieces_of(spreads, plain), factor)


def _clamp(join: Join, engine: None, places: Any, bound: float) -> None:
    clip.clip_grad_value_(join.params(places), bound)


def _operation(join: Join, engine: None, name: str, many: bool, places: Any, args: Any, kwargs: Any) -> None:
    handles = [p.grad for p in join.params(places)]
    device = handles[0].device
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    sharded_grad.BY_NAME[name](handles if many else handles[0], *args, **kwargs)


def _values(join: Join, engine: Engine, unit: int, bucket: int, kind: str) -> None:
    b = engine.units[unit].buckets[bucket]
    if kind == "values":
        b.full_values()
    else:
        b.grads.full()


def _step(join: Join, engine: None, index: int, masks: Any, settings: Any) -> None:
    optimizer = join.optimizers[index]
    for k, gradients in masks:
        take_mask(join.engines[k], gradients)
    if settings is not None:
        take_settings(join.optimizers, {index: settings})
    # Parameters of no model are each rank's own business: nothing was computed for them here.
    loose = [(p, p.grad) for g in optimizer.param_groups for p in g["params"] if not hasattr(p, "_shardwise_unit")]
    for p, _ in loose:
        p.grad = None
    optimizer.step()
    for p, grad in loose:
        p.grad = grad


RULES: dict[str, Callable[..., None]] = {
    "gather": _gather, "buffers": _buffers, "backward": _backward, "launch": _launch,
    "backward_ends": _backward_ends, "abandon": _abandon, "scale": _scale, "grads": _grads, "norms": _norms,
    "multiply": _multiply, "clamp": _clamp, "operation": _operation, "values": _values, "step": _step,
}  # fmt: skip
