"""Clipping of gradients that may be spread over ranks.

The squares are summed per shard of each parameter's pieces, the same pieces under every strategy, then over shards in
order. One collective per mesh, of one number per shard, whatever the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from shardwise.comm import World
from shardwise.engine.commands import Command
from shardwise.engine.gradients import grads_of
from shardwise.engine.norms import Spread, combine, order_of, per_shard
from shardwise.engine.sharded_grad import spread_of
from shardwise.engine.unit import unit_of
from shardwise.errors import GradientError


def clip_grad_norm_(
    params: nn.Module | Iterable[nn.Parameter],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale all gradients so that their global norm is at most ``max_norm``; returns the norm before.

    The same as ``torch.nn.utils.clip_grad_norm_`` on one process, exact under every strategy, with
    sharded and plain parameters mixed, and units on several meshes.

    Args:
        params: a module or its parameters.
        max_norm: upper bound of the norm.
        norm_type: 2 by default; any number above 0; ``inf`` for the largest absolute value.
        error_if_nonfinite: raise instead of scaling by a norm that is inf or nan.

    Returns:
        The total norm, 0-dim, equal on every rank. Real, also of complex gradients; fp64 if one of them is so wide,
        else fp32.

    Raises:
        GradientError: a gradient has not been reduced yet, the norm's order is not above 0, or ``error_if_nonfinite``.

    Cost: one pass to measure, one to scale; one all-gather of ``world size`` numbers per mesh.
    """
    order, held = order_of(norm_type), _with_gradients(params)
    spreads, plain = settled(held)
    total = _norm(held, spreads, plain, order)
    if error_if_nonfinite and not torch.isfinite(total):
        raise GradientError(
            f"the norm of the gradients is {float(total)}", fix="lower the learning rate or skip this step"
        )
    # Multiply always, even by one: a branch on the value would make a GPU wait for it.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    if held:
        with announced(Command.MULTIPLY, held, factor.cpu):
            multiply_(held, pieces_of(spreads, plain), factor)
    return total


def grad_norm(params: nn.Module | Iterable[nn.Parameter], norm_type: float = 2.0) -> torch.Tensor:
    """The norm that :func:`clip_grad_norm_` returns, of gradients that stay as they are.

    Cost: one pass; one all-gather of ``world size`` numbers per mesh.
    """
    order, held = order_of(norm_type), _with_gradients(params)
    return _norm(held, *settled(held), order)


def _norm(
    held: Sequence[nn.Parameter], spreads: Sequence[Spread], plain: Sequence[torch.Tensor], order: float
) -> torch.Tensor:
    with announced(Command.NORMS, held, order):
        return combine(per_shard(spreads, plain, order), order)


def multiply_(params: Sequence[nn.Parameter], grads: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients, which may be on several devices, by a number on any.

    Args:
        params: whose they are.
        grads: what :func:`settled` gave for these: pieces of them.
    """
    places: dict[torch.device, list[torch.Tensor]] = {}
    for grad in grads:
        places.setdefault(grad.device, []).append(grad)
    for device, there in places.items():
        torch._foreach_mul_(there, factor.to(device))
    for p in params:
        if (unit := unit_of(p)) is not None:
            bucket, index = unit.places[id(p)]
            bucket.grads.scalings.add(index, factor)


def clip_grad_value_(params: nn.Module | Iterable[nn.Parameter], clip_value: float) -> None:
    """Clamp every gradient element to ``[-clip_value, clip_value]``. No communication.

    Raises:
        GradientError: a gradient is complex, or has not been reduced yet.
    """
    held = _with_gradients(params)
    spreads, plain = settled(held)
    if any(s.dtype.is_complex for s in spreads) or any(g.is_complex() for g in plain):
        raise GradientError("complex gradients cannot be clamped", fix="use clip_grad_norm_")
    if held:
        with announced(Command.CLAMP, held, clip_value):
            for p in held:
                if (unit := unit_of(p)) is not None:
                    bucket, index = unit.places[id(p)]
                    bucket.grads.scalings.forget(index)
            if pieces := pieces_of(spreads, plain):
                torch._foreach_clamp_min_(pieces, -abs(clip_value))
                torch._foreach_clamp_max_(pieces, abs(clip_value))


def announced(kind: Command, params: Sequence[nn.Parameter], *args: Any) -> AbstractContextManager[None]:
    """Around a change of these parameters' gradients: ranks that have run out of data make it too."""
    join = World.current().join
    return nullcontext() if join is None else join.event(kind, None, join.addresses(params), *args)


def _with_gradients(params: nn.Module | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each parameter that has a gradient, once."""
    found = list(params.parameters() if isinstance(params, nn.Module) else params)
    there = {id(p): p for p, grad in zip(found, grads_of(found), strict=True) if grad is not None}
    return list(there.values())


def settled(params: Sequence[nn.Parameter]) -> tuple[list[Spread], list[torch.Tensor]]:
    """What this rank holds of the reduced gradients of sharded parameters, and the gradients of plain ones."""
    spreads, plain = [], []
    for p in params:
        unit = unit_of(p)
        if unit is None:
            assert p.grad is not None
            plain.append(p.grad)
        else:
            bucket, index = unit.places[id(p)]
            bucket.grads.require_reduced(index)
            bucket.grads.for_step(index)  # takes over what was put into p.grad by hand
            spreads.append(spread_of(bucket.grads, index))
    return spreads, plain


def pieces_of(spreads: Sequence[Spread], plain: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [*(piece for spread in spreads for piece in spread.pieces), *plain]
