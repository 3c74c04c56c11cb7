"""What a rank without data does for those that have some, beyond one engine's commands: what concerns several models,
or optimizers. One rule per :class:`~shardwise.engine.commands.Command`; see :mod:`shardwise.engine.join`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from shardwise.engine import clip, norms, sharded_grad
from shardwise.engine.bucket import Bucket
from shardwise.engine.commands import Command
from shardwise.engine.engine import Engine
from shardwise.engine.unit import unit_of


class Followed(Protocol):
    """What the rules ask of the block they are in (:class:`shardwise.engine.join.Join`)."""

    engines: list[Engine]
    optimizers: list[Optimizer]

    def params(self, addresses: Sequence[tuple[int, int, int]]) -> list[Any]: ...
    def take_grads(self, engine: Engine, place: int) -> None: ...


def take_settings(optimizers: Sequence[Optimizer], settings: dict[int, Any]) -> None:
    """Give optimizers, by position, the settings of their groups."""
    for k, groups in settings.items():
        for group, values in zip(optimizers[k].param_groups, groups, strict=True):
            group.update(values)


def holds(engine: Engine, optimizer: Optimizer) -> bool:
    """Does an optimizer hold parameters of a model?"""
    return any(
        (unit := unit_of(p)) is not None and unit.upward is engine
        for group in optimizer.param_groups
        for p in group["params"]
    )


def whole(engine: Engine) -> list[Bucket]:
    """Buckets whose ``p.grad`` are plain tensors."""
    return [b for u in engine.units for b in u.buckets if not b.placement.split_state and not b.grads.on_host]


def adopt(bucket: Bucket) -> None:
    """Take over gradients that were put into ``p.grad`` by hand."""
    for i, p in enumerate(bucket.params):
        if p.grad is not None and not bucket.grads.is_shown(i, p.grad):
            bucket.grads.adopt(i, p.grad)
            bucket.grads.show(i, p)


def _norms(join: Followed, places: Any, norm_type: float) -> None:
    norms.per_shard(*clip.settled(join.params(places)), norm_type)


def _multiply(join: Followed, places: Any, factor: torch.Tensor) -> None:
    params = join.params(places)
    spreads, plain = clip.settled(params)
    clip.multiply_(params, clip.pieces_of(spreads, plain), factor)


def _clamp(join: Followed, places: Any, bound: float) -> None:
    clip.clip_grad_value_(join.params(places), bound)


def _operation(join: Followed, name: str, many: bool, places: Any, args: Any, kwargs: Any) -> None:
    handles = [p.grad for p in join.params(places)]
    device = handles[0].device
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    sharded_grad.BY_NAME[name](handles if many else handles[0], *args, **kwargs)


def _step(join: Followed, index: int, masks: Any, settings: Any) -> None:
    optimizer = join.optimizers[index]
    for k, gradients in masks:
        join.engines[k].take_gradients(gradients)
    if settings is not None:
        take_settings(join.optimizers, {index: settings})
    # Parameters of no model are each rank's own business: nothing was computed for them here.
    loose = [(p, p.grad) for g in optimizer.param_groups for p in g["params"] if unit_of(p) is None]
    for p, _ in loose:
        p.grad = None
    optimizer.step()
    for p, grad in loose:
        p.grad = grad


RULES: dict[Command, Callable[..., None]] = {
    Command.NORMS: _norms, Command.MULTIPLY: _multiply, Command.CLAMP: _clamp, Command.OPERATION: _operation,
    Command.STEP: _step,
}  # fmt: skip
