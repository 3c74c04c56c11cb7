"""Norms and clipping of gradients that may be spread over ranks.

The squares are summed per shard of each parameter's pieces, the same pieces under every strategy, then over shards in
order. One collective, of one number per shard, whatever the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from shardwise.comm import World
from shardwise.engine.attachment import unit_of
from shardwise.engine.bucket import Bucket
from shardwise.engine.grads import ShardedGrad
from shardwise.errors import GradientError


def clip_grad_norm_(
    params: nn.Module | Iterable[nn.Parameter],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale all gradients so that their global norm is at most ``max_norm``; returns the norm before.

    The same as ``torch.nn.utils.clip_grad_norm_`` on one process, exact under every strategy, with
    sharded and plain parameters mixed.

    Args:
        params: a module or its parameters.
        max_norm: upper bound of the norm.
        norm_type: 2 by default; ``inf`` for the largest absolute value.
        error_if_nonfinite: raise instead of scaling by a norm that is inf or nan.

    Returns:
        The total norm, 0-dim fp32 tensor, equal on every rank.

    Raises:
        GradientError: a gradient has not been reduced yet, or ``error_if_nonfinite``.

    Cost: one pass to measure, one to scale; one all-gather of ``world size`` numbers.
    """
    held = [p for p in (params.parameters() if isinstance(params, nn.Module) else params) if p.grad is not None]
    grads = _settled(held)
    with told("norms", held, norm_type):
        total = combine(shard_norms(grads, norm_type), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise GradientError(
            f"the norm of the gradients is {float(total)}", fix="lower the learning rate or skip this step"
        )
    # Multiply always, even by one: a branch on the value would make a GPU wait for it.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    pieces = [piece for _, _, ps in grads for piece in ps]
    if pieces:
        with told("multiply", held, factor.cpu):
            multiply_(pieces, factor)
    return total


def multiply_(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply tensors, which may be on several devices, by a number on any."""
    places: dict[torch.device, list[torch.Tensor]] = {}
    for t in tensors:
        places.setdefault(t.device, []).append(t)
    for device, there in places.items():
        torch._foreach_mul_(there, factor.to(device))


def clip_grad_value_(params: nn.Module | Iterable[nn.Parameter], clip_value: float) -> None:
    """Clamp every gradient element to ``[-clip_value, clip_value]``. No communication."""
    held = [p for p in (params.parameters() if isinstance(params, nn.Module) else params) if p.grad is not None]
    pieces = [piece for _, _, ps in _settled(held) for piece in ps]
    if pieces:
        with told("clamp", held, clip_value):
            torch._foreach_clamp_min_(pieces, -abs(clip_value))
            torch._foreach_clamp_max_(pieces, abs(clip_value))


def told(kind: str, params: Sequence[nn.Parameter], *args: Any) -> AbstractContextManager[None]:
    """Around a change of these parameters' gradients: ranks that have run out of data make it too."""
    join = World.current().join
    return nullcontext() if join is None else join.event(kind, None, join.addresses(params), *args)


Settled = tuple[Bucket | None, int, list[torch.Tensor]]


def _settled(params: Sequence[nn.Parameter]) -> list[Settled]:
    """(bucket, index, held pieces of the gradient) of each parameter, once; plain ones as they are."""
    out: list[Settled] = []
    seen: set[int] = set()
    for p in params:
        if id(p) in seen:
            continue
        seen.add(id(p))
        unit = unit_of(p)
        if unit is None:
            assert p.grad is not None
            out.append((None, 0, [p.grad]))
        else:
            bucket, index = unit.places[id(p)]
            bucket.grads.require_reduced(index)
            out.append((bucket, index, bucket.grads.for_step(index) or []))
    return out


@torch.no_grad()
def shard_norms(grads: Sequence[Settled], norm_type: float) -> list[torch.Tensor]:
    """Norms per shard, then of plain gradients: a list of 1-D tensors whose p-norm is the total."""
    meshes: dict[int, tuple[Bucket, list[tuple[int, torch.Tensor]]]] = {}
    plain: list[torch.Tensor] = []
    for bucket, index, pieces in grads:
        if bucket is None:
            plain += pieces
        else:
            _, found = meshes.setdefault(id(bucket.mesh), (bucket, []))
            found += zip(bucket.held_shards(index), pieces, strict=True)
    out = []
    for bucket, found in meshes.values():
        mesh, device = bucket.mesh, bucket.device
        norms = torch._foreach_norm([g for _, g in found], norm_type, torch.float32) if found else []
        mine: dict[int, list[torch.Tensor]] = {}
        for (shard, _), norm in zip(found, norms, strict=True):
            mine.setdefault(shard, []).append(norm)
        row = torch.zeros(mesh.parts, dtype=torch.float32, device=device)
        for shard, parts in mine.items():
            row[shard] = torch.linalg.vector_norm(torch.stack(parts), norm_type)
        if bucket.split_optimizer:
            mesh.gather(row, bucket.op("norm")).wait()
        out.append(row)
    if plain:
        out.append(torch.stack([torch.linalg.vector_norm(g, norm_type, dtype=torch.float32) for g in plain]))
    return out


def combine(rows: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    if not rows:
        return torch.tensor(0.0)
    return torch.linalg.vector_norm(torch.cat([r.to(rows[0].device) for r in rows]), norm_type)


def norms_of(grads: Sequence[torch.Tensor], norm_type: float) -> list[torch.Tensor]:
    """The norm of each gradient over all ranks (one small collective): what ``torch.nn.utils`` asks for."""
    out: list[torch.Tensor] = [torch.empty(0)] * len(grads)
    sharded: list[tuple[int, ShardedGrad]] = []
    for k, g in enumerate(grads):
        if isinstance(g, ShardedGrad):
            g.bucket.grads.require_reduced(g.slot)
            sharded.append((k, g))
        else:
            out[k] = torch.linalg.vector_norm(g, norm_type)
    if not sharded:
        return out
    bucket = sharded[0][1].bucket
    shard = bucket.mesh.shard
    table = torch.zeros(shard.size, len(sharded), dtype=torch.float32, device=bucket.device)
    for column, (_, g) in enumerate(sharded):
        pieces = g.local
        if pieces:
            table[shard.rank, column] = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(p, norm_type, dtype=torch.float32) for p in pieces]), norm_type
            )
    shard.all_gather(table.view(-1), bucket.op("norm")).wait()
    total = torch.linalg.vector_norm(table, norm_type, dim=0)
    for column, (k, _) in enumerate(sharded):
        out[k] = total[column]
    return out
