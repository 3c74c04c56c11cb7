"""Norms of gradients that are spread over ranks, and votes about overflows.

Sums go mesh by mesh, in the order in which parameters are given, which is the same on all ranks. Ranks that hold
nothing of a parameter take part all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from shardwise.comm.mesh import Mesh
from shardwise.comm.stats import Op
from shardwise.errors import GradientError


@dataclass(frozen=True)
class Spread:
    """What this rank holds of one parameter's reduced gradient.

    Args:
        mesh: where it is spread; its shard axis may have one rank, which then holds all of it.
        op: what a collective about it is called.
        dtype, device: of the whole gradient; the pieces may have another home.
        shards: per piece, the shard it lies in.
        pieces: slices of the flattened gradient, or the whole of it.
    """

    mesh: Mesh
    op: Op
    dtype: torch.dtype
    device: torch.device
    shards: Sequence[int]
    pieces: Sequence[torch.Tensor]


def order_of(norm_type: float) -> float:
    """The order of a norm, as a number.

    Raises:
        GradientError: norms of this order do not add up from the norms of parts.
    """
    order = float(norm_type)
    if math.isnan(order) or order <= 0:
        raise GradientError(f"a norm of order {norm_type} does not clip", fix="give a number above 0, or inf")
    return order


def norm(tensor: torch.Tensor, order: float) -> torch.Tensor:
    """The norm of one tensor: real, in fp32 or wider."""
    if not tensor.numel():
        return torch.zeros((), dtype=dtype_of(tensor.dtype), device=tensor.device)
    return torch.linalg.vector_norm(tensor, order, dtype=_summed_in(tensor.dtype))


def dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the norm of such a gradient: real, fp32 or wider."""
    return _summed_in(dtype).to_real()


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype_of(dtype))
    return wide


def _by_mesh(spreads: Sequence[Spread]) -> list[list[int]]:
    """Which of them are on one mesh, in an order that all ranks share."""
    meshes: dict[int, list[int]] = {}
    for k, spread in enumerate(spreads):
        meshes.setdefault(id(spread.mesh), []).append(k)
    return list(meshes.values())


@torch.no_grad()
def per_shard(spreads: Sequence[Spread], plain: Sequence[torch.Tensor], order: float) -> list[torch.Tensor]:
    """Norms per shard, mesh by mesh, then of plain gradients: 1-D tensors whose norm is the total.

    The shards are the same under every strategy, and so are the bits. One all-gather of one number per shard and mesh.
    """
    rows = []
    for members in _by_mesh(spreads):
        first = spreads[members[0]]
        found = [(s, g) for k in members for s, g in zip(spreads[k].shards, spreads[k].pieces, strict=True)]
        row = torch.zeros(first.mesh.parts, dtype=_widest(spreads[k].dtype for k in members), device=first.device)
        mine: dict[int, list[torch.Tensor]] = {}
        for (shard, _), value in zip(found, _norms([g for _, g in found], order), strict=True):
            mine.setdefault(shard, []).append(value.to(first.device))
        for shard, parts in mine.items():
            row[shard] = torch.linalg.vector_norm(torch.stack(parts), order)
        if first.mesh.shard.size > 1:
            first.mesh.gather(row, first.op).wait()
        rows.append(row)
    if plain:
        rows.append(torch.stack([norm(g, order).to(plain[0].device) for g in plain]))
    return rows


def _norms(tensors: Sequence[torch.Tensor], order: float) -> list[torch.Tensor]:
    """:func:`norm` of each tensor, those of one dtype and device in one call where torch can."""
    out: list[torch.Tensor | None] = [None] * len(tensors)
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, t in enumerate(tensors):
        if t.numel() and not t.is_complex():
            kinds.setdefault((t.dtype, t.device), []).append(k)
    for (dtype, _), members in kinds.items():
        together = torch._foreach_norm([tensors[k] for k in members], order, _summed_in(dtype))
        for k, value in zip(members, together, strict=True):
            out[k] = value
    return [norm(t, order) if value is None else value for t, value in zip(tensors, out, strict=True)]


def combine(rows: Sequence[torch.Tensor], order: float) -> torch.Tensor:
    """The total of what :func:`per_shard` found."""
    if not rows:
        return torch.tensor(0.0)
    return torch.linalg.vector_norm(torch.cat([r.to(rows[0].device) for r in rows]), order)


@torch.no_grad()
def per_tensor(spreads: Sequence[Spread], order: float) -> list[torch.Tensor]:
    """The norm of each gradient over all ranks. One all-gather of one number per gradient and mesh."""
    out: list[torch.Tensor] = [torch.empty(0)] * len(spreads)
    for members in _by_mesh(spreads):
        first = spreads[members[0]]
        shard = first.mesh.shard
        wide = _widest(spreads[k].dtype for k in members)
        table = torch.zeros(shard.size, len(members), dtype=wide, device=first.device)
        for column, k in enumerate(members):
            if pieces := spreads[k].pieces:
                parts = torch.stack([norm(p, order).to(first.device) for p in pieces])
                table[shard.rank, column] = torch.linalg.vector_norm(parts, order)
        shard.all_gather(table.view(-1), first.op).wait()
        total = torch.linalg.vector_norm(table, order, dim=0)
        for column, k in enumerate(members):
            out[k] = total[column].to(dtype_of(spreads[k].dtype))
    return out


def agree(found: torch.Tensor, spreads: Sequence[Spread]) -> None:
    """``found`` is not zero on any rank: then it is on all ranks of the world. In place.

    Of all ranks, not of one mesh's: the ranks that share a shard group of one unit may meet others in the next.
    """
    split = next((s for s in spreads if s.mesh.shard.size > 1), None)
    if split is None:
        return  # every rank has looked at all of it
    whole = split.mesh.whole
    votes = torch.zeros(whole.size, dtype=torch.float32, device=split.device)
    votes[whole.rank] = found.to(split.device).reshape(())
    whole.all_gather(votes, split.op).wait()
    found.copy_(votes.max())
