"""What ranks must say alike when they shard a model: otherwise they wait for messages of each other that never come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

from torch import nn

from shardwise.comm import World
from shardwise.comm.objects import exchange, over, to_bytes
from shardwise.comm.stats import Op
from shardwise.errors import StrategyError, UnitError
from shardwise.strategy import Strategy

_OF_EACH_RANK = frozenset(
    ("nvme_path", "pin_memory", "offload_buffers", "offload_depth", "offload_checksum", "timeout")
)  # these change nothing that other ranks see
_OP = Op("control", "what is sharded", 4)  # units count their tags from 8
_FIX = "call fully_shard with the same model, strategy and units on every rank"


def require_agreement(
    world: World,
    strategy: Strategy,
    mesh: Sequence[int],
    params: Sequence[tuple[str, nn.Parameter]],
    units: Iterable[str],
) -> None:
    """Compare what this rank is about to shard with what the others are. Collective.

    Args:
        mesh: the sizes of its axes, if the caller has given one.
        params: with their names.
        units: their names, in their order.

    Raises:
        StrategyError: another strategy or mesh somewhere, on every rank alike.
        UnitError: another model, or other units.

    Cost: half a KiB to each other rank; the lists themselves only if they differ.
    """
    if world.fake or world.size == 1:
        return
    listing = [*_lines(params), *(f"unit '{name}'" for name in units)]
    digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()
    told = _tell(world, strategy.timeout, [_settings(strategy, mesh), digest])
    for rank, (settings, _) in enumerate(told):
        if settings != told[0][0]:
            mine, theirs = _apart(told[0][0], settings)
            raise StrategyError(
                f"ranks shard under different strategies: {mine} on rank 0, {theirs} on rank {rank}",
                where=f"rank {world.rank}",
                fix=_FIX,
            )
    if any(digest != told[0][1] for _, digest in told):
        _name_the_difference(world, _tell(world, strategy.timeout, listing))


def _settings(strategy: Strategy, mesh: Sequence[int]) -> dict[str, Any]:
    found = {f.name: getattr(strategy, f.name) for f in fields(strategy) if f.name not in _OF_EACH_RANK}
    return {**found, "mesh": list(mesh)}


def _apart(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, str]:
    names = [name for name, value in ours.items() if theirs.get(name) != value]
    first, second = (", ".join(f"{name}={its.get(name)}" for name in names) for its in (ours, theirs))
    return first, second


def _lines(params: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """A line for each parameter."""
    out = []
    for name, p in params:
        frozen = "" if p.requires_grad else " frozen"
        out.append(f"parameter '{name}' {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}{frozen}")
    return out


def _tell(world: World, timeout: float, what: Any) -> list[Any]:
    rows = exchange(json.dumps(what).encode(), over(world.control_group(timeout), _OP))
    return [json.loads(to_bytes(row)) for row in rows]


def _name_the_difference(world: World, listings: Sequence[Sequence[str]]) -> None:
    rank, theirs = next((r, lines) for r, lines in enumerate(listings) if lines != listings[0])
    mine, other = next((a, b) for a, b in zip_longest(listings[0], theirs, fillvalue="nothing more") if a != b)
    raise UnitError(
        f"ranks shard different models: {mine} on rank 0, {other} on rank {rank}",
        where=f"rank {world.rank}",
        fix=_FIX,
    )
