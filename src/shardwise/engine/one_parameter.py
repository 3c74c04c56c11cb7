"""The master values and the gradient of one parameter: whole, or this rank's part; read or replaced.

A part is what this rank holds, end to end, ``(n,)``: it may be empty. Whatever is under way takes place first, and
what is replaced is what the next step, and whoever reads the parameter, sees. Functions that say so are collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from shardwise.engine.bucket import Bucket
from shardwise.engine.sharded_grad import ShardedGrad
from shardwise.engine.unit import Unit, unit_of
from shardwise.errors import ArgumentError, GradientError


class Place(NamedTuple):
    """Where a parameter is."""

    unit: Unit
    bucket: Bucket
    number: int  # in the bucket
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def cut(self, flat: torch.Tensor) -> torch.Tensor:
        """Its part of a flat buffer, in memory of its own."""
        return flat[self.start : self.stop].view(self.shape).clone()


def place_in(p: nn.Parameter) -> Place:
    """Where a parameter is.

    Raises:
        ArgumentError: in no sharded model.
    """
    unit = unit_of(p)
    if unit is None:
        raise ArgumentError(
            "the parameter belongs to no sharded model", fix="ask for parameters of a model after it was sharded"
        )
    bucket, index = unit.places[id(p)]
    slot = bucket.layout.slots[index]
    return Place(unit, bucket, index, bucket.names[index], slot.shape, slot.offset, slot.stop)


def whole_of(at: Place, value: torch.Tensor) -> torch.Tensor:
    """A value for all of a parameter, flat."""
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != at.shape:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ArgumentError(
            f"a value of {got} for {at.shape}", where=f"parameter '{at.name}'", fix="give all of it, on every rank"
        )
    return value.detach().reshape(-1)


def cut_part(at: Place, part: torch.Tensor) -> list[torch.Tensor]:
    """This rank's part of something, by pieces."""
    sizes = [hi - lo for lo, hi in at.bucket.ranges(at.number)]
    if not isinstance(part, torch.Tensor) or part.numel() != sum(sizes):
        raise ArgumentError(
            f"{part.numel() if isinstance(part, torch.Tensor) else part!r} elements, and this rank holds {sum(sizes)}",
            where=f"parameter '{at.name}'",
            fix="give as many as the part has that you read",
        )
    return list(part.detach().reshape(-1).split(sizes)) if sizes else []


def joined(at: Place, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
    """Pieces end to end, in memory of their own."""
    found = [piece.detach().reshape(-1) for piece in pieces]
    if not found:
        return torch.empty(0, dtype=at.bucket.master_dtype, device=at.bucket.device)
    return torch.cat(found).clone()


# --- master values -----------------------------------------------------------------------------------------
def full_values(p: nn.Parameter) -> torch.Tensor:
    """All master values, in the parameter's shape and the master dtype. Collective where they are split."""
    at = place_in(p)
    with torch.no_grad():
        return at.cut(at.unit.full_values(at.bucket))


@torch.no_grad()
def set_full_values(p: nn.Parameter, value: torch.Tensor) -> None:
    """Replace all master values; the parameter's own follow. Collective where they are split.

    Args:
        value: in the parameter's shape, the same on every rank.
    """
    at = place_in(p)
    flat = whole_of(at, value)
    _write(at, [flat[lo:hi] for lo, hi in at.bucket.ranges(at.number)])


@torch.no_grad()
def local_values(p: nn.Parameter) -> torch.Tensor:
    """This rank's part of the master values."""
    at = place_in(p)
    with at.bucket.master_here():
        return joined(at, at.bucket.piece_params[at.number])


@torch.no_grad()
def set_local_values(p: nn.Parameter, part: torch.Tensor) -> None:
    """Replace this rank's part of the master values. Collective where they are split."""
    at = place_in(p)
    _write(at, cut_part(at, part))


def _write(at: Place, parts: list[torch.Tensor]) -> None:
    at.bucket.require_writable()
    at.unit.reconcile()
    at.unit.finish_transfers()
    with at.bucket.master_here(write=True):
        for piece, mine in zip(at.bucket.piece_params[at.number], parts, strict=True):
            piece.copy_(mine.view(piece.shape))
    at.unit.publish([at.bucket])


# --- gradients -----------------------------------------------------------------------------------------------
def full_grad(p: nn.Parameter) -> torch.Tensor | None:
    """All of the reduced gradient, or ``None``. Collective where gradients are split.

    Raises:
        GradientError: it is not reduced yet, or an update has used it up.
    """
    return next(full_grads([p]))


@torch.no_grad()
def full_grads(params: Iterable[nn.Parameter]) -> Iterator[torch.Tensor | None]:
    """:func:`full_grad` of several: a flat buffer is brought together once for those in it that follow one another."""
    last: tuple[Bucket, torch.Tensor] | None = None
    for p in params:
        at, grad = place_in(p), p.grad
        if grad is None:
            yield None
        elif not isinstance(grad, ShardedGrad):
            yield grad.detach().clone()
        else:
            at.bucket.grads.require_reduced(at.number)
            if last is None or last[0] is not at.bucket:
                last = at.bucket, at.unit.full_grads(at.bucket)
            yield at.cut(last[1])


@torch.no_grad()
def set_full_grad(p: nn.Parameter, value: torch.Tensor) -> None:
    """Replace the reduced gradient, also where there is none.

    Args:
        value: in the parameter's shape, the same on every rank.
    """
    at = place_in(p)
    flat = whole_of(at, value)
    grad = p.grad
    if grad is None:
        p.grad = value.detach().to(device=at.bucket.device, dtype=at.bucket.master_dtype, copy=True)
    elif not isinstance(grad, ShardedGrad):
        grad.copy_(value)
    else:
        _write_grad(at, [flat[lo:hi] for lo, hi in at.bucket.ranges(at.number)])


@torch.no_grad()
def local_grad(p: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the reduced gradient, or ``None``."""
    at, grad = place_in(p), p.grad
    if grad is None:
        return None
    if not isinstance(grad, ShardedGrad):
        return joined(at, [grad.reshape(-1)[lo:hi] for lo, hi in at.bucket.ranges(at.number)])
    at.bucket.grads.require_reduced(at.number)
    return joined(at, at.bucket.grads.pieces(at.number))


@torch.no_grad()
def set_local_grad(p: nn.Parameter, part: torch.Tensor) -> None:
    """Replace this rank's part of the reduced gradient.

    Raises:
        GradientError: there is none.
    """
    at, grad = place_in(p), p.grad
    parts = cut_part(at, part)
    if grad is None:
        raise GradientError(
            "there is no gradient to replace a part of", where=f"parameter '{at.name}'", fix="run a backward first"
        )
    if not isinstance(grad, ShardedGrad):
        for (lo, hi), mine in zip(at.bucket.ranges(at.number), parts, strict=True):
            grad.view(-1)[lo:hi].copy_(mine)
    else:
        _write_grad(at, parts)


def _write_grad(at: Place, parts: list[torch.Tensor]) -> None:
    grads = at.bucket.grads
    grads.require_reduced(at.number)
    grads.scalings.forget(at.number)
    for piece, mine in zip(grads.pieces(at.number), parts, strict=True):
        piece.copy_(mine.view(piece.shape))
