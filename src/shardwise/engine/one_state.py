"""What an optimizer keeps for one parameter: whole, or this rank's part; read or replaced, wherever its home is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.comm.stats import Op
from shardwise.engine.attachment import attachment_of, require_attachment
from shardwise.engine.commands import Command
from shardwise.engine.engine import Engine
from shardwise.engine.one_parameter import Place, cut_part, joined, place_in, whole_of
from shardwise.engine.optimizer_state import wait_for_readers
from shardwise.errors import OptimizerError
from shardwise.tiers.swapped_tensor import fetch, is_swapped

_TAG = 7  # below those of units
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NONE, _FITS, _NUMBER, _OTHER = range(4)  # of a state


def _optimizer_of(at: Place) -> Optimizer | None:
    """The one whose groups hold the parameter."""
    upward = at.unit.upward
    for optimizer in upward.optimizers if isinstance(upward, Engine) else ():
        record = attachment_of(optimizer)
        if record is not None and any(unit is at.unit for unit in record.units):
            param = at.bucket.params[at.number]
            if any(p is param for p in record.params):
                record.finish_updates()
                return optimizer
    return None


def _states(at: Place, key: str) -> list[Any]:
    """What the optimizer has under ``key`` for each piece; empty if it has nothing for one of them."""
    optimizer = _optimizer_of(at)
    if optimizer is None:
        return []
    pieces = at.bucket.piece_params[at.number]
    found = [optimizer.state[piece].get(key) if piece in optimizer.state else None for piece in pieces]
    return [] if any(value is None for value in found) else found


@torch.no_grad()
def full_state(p: nn.Parameter, key: str) -> torch.Tensor | None:
    """All of what the optimizer keeps for a parameter under ``key``, or ``None``. Collective.

    In the parameter's shape; a number that is one per parameter is a 0-dim tensor.

    Raises:
        OptimizerError: it has another shape than the parameter.
    """
    at = place_in(p)
    bucket = at.bucket
    found = [fetch(v) if isinstance(v, torch.Tensor) and is_swapped(v) else v for v in _states(at, key)]
    kind, dtype, number = _agree(at, key, found)
    if kind == _NONE:
        return None
    if kind == _NUMBER:
        return torch.tensor(number, dtype=dtype)
    if kind == _OTHER:
        raise OptimizerError(
            f"state '{key}' has another shape than the parameter",
            where=f"parameter '{at.name}'",
            fix="read it with 'with shardwise.optimizer_state(optimizer) as state:' on the rank that holds it",
        )
    out = torch.zeros(bucket.layout.numel, dtype=dtype, device=bucket.device)
    for value, (lo, hi) in zip(found, bucket.ranges(at.number), strict=False):
        out[at.start + lo : at.start + hi].copy_(value.reshape(-1))
    with at.unit.upward.announce(Command.VALUES, at.unit.index, at.unit.buckets.index(bucket), "values"):
        bucket.mesh.gather(out, bucket.op("state")).wait()
    return at.cut(out)


def _agree(at: Place, key: str, found: list[Any]) -> tuple[int, torch.dtype, float]:
    """What all ranks together know of a state."""
    kind, dtype, number = _NONE, torch.float32, 0.0
    if found:
        first = found[0]
        if not isinstance(first, torch.Tensor):
            kind, number = _NUMBER, float(first)
        elif first.shape == at.bucket.piece_params[at.number][0].shape and first.dim() > 0:
            kind, dtype = _FITS, first.dtype
        elif first.numel() == 1:
            kind, number, dtype = _NUMBER, float(first), first.dtype
        else:
            kind = _OTHER
        if first is not None and dtype not in _DTYPES:
            kind = _OTHER
    group = at.bucket.mesh.control
    if group.size == 1 or at.bucket.mesh.world.fake:
        return kind, dtype, number
    rows = torch.zeros(group.size, 3, dtype=torch.float64)
    rows[group.rank] = torch.tensor([kind, _DTYPES.index(dtype) if dtype in _DTYPES else 0, number])
    group.all_gather(rows.view(-1), Op("control", f"state '{key}' of '{at.name}'", _TAG)).wait()
    best = rows[int(rows[:, 0].argmax())].tolist()
    return int(best[0]), _DTYPES[int(best[1])], best[2]


@torch.no_grad()
def set_full_state(p: nn.Parameter, key: str, value: torch.Tensor) -> None:
    """Replace all of what the optimizer keeps for a parameter under ``key``.

    Args:
        value: in the parameter's shape (0-dim for a number), the same on every rank.

    Raises:
        OptimizerError: there is no such state: it is made by the first step.
    """
    at = place_in(p)
    number = value.dim() == 0 and at.shape != ()
    flat = value.detach() if number else whole_of(at, value)
    ranges = at.bucket.ranges(at.number)
    _write_state(at, key, [flat if number else flat[lo:hi] for lo, hi in ranges])


@torch.no_grad()
def local_state(p: nn.Parameter, key: str) -> torch.Tensor | None:
    """This rank's part of what the optimizer keeps for a parameter under ``key``; ``None``: it keeps nothing there.

    Empty on a rank that holds nothing of the parameter, as far as it can tell from others that it holds a part of.
    """
    at = place_in(p)
    if not at.bucket.piece_params[at.number]:
        optimizer = _optimizer_of(at) if p.requires_grad else None
        kept = [] if optimizer is None else [state[key] for state in optimizer.state.values() if key in state]
        return next((joined(at, []).to(v.dtype) for v in kept if isinstance(v, torch.Tensor) and v.dim()), None)
    found = [fetch(v) if isinstance(v, torch.Tensor) and is_swapped(v) else v for v in _states(at, key)]
    if not found:
        return None
    first = found[0]
    if not isinstance(first, torch.Tensor) or first.dim() == 0:
        return torch.as_tensor(first).clone()
    return joined(at, found)


@torch.no_grad()
def set_local_state(p: nn.Parameter, key: str, part: torch.Tensor) -> None:
    """Replace this rank's part of what the optimizer keeps for a parameter under ``key``.

    Raises:
        OptimizerError: there is no such state.
    """
    at = place_in(p)
    _write_state(at, key, cut_part(at, part))


def _write_state(at: Place, key: str, parts: list[torch.Tensor]) -> None:
    if not parts:
        return
    with _state_open(at, key) as values:
        for value, mine in zip(values, parts, strict=True):
            value.copy_(mine.view(value.shape))


@contextmanager
def _state_open(at: Place, key: str) -> Iterator[list[torch.Tensor]]:
    found, optimizer = _states(at, key), _optimizer_of(at)
    if optimizer is None or not found or not all(isinstance(value, torch.Tensor) for value in found):
        raise OptimizerError(
            f"there is no state '{key}' to replace",
            where=f"parameter '{at.name}'",
            fix="optimizers make their state in the first step; names are those of optimizer.state, such as 'exp_avg'",
        )
    wait_for_readers(optimizer)
    if at.bucket.home is None:
        yield found
        return
    shard = require_attachment(optimizer).shard_of(at.bucket)
    shard.materialise(optimizer.state)
    yield found
    shard.flush(optimizer.state)
