"""Small units travel together: their reduces, and their gathers.

What goes into one message is decided by the order of units and by their sizes, which are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from shardwise.comm import joined
from shardwise.comm.joined import JoinedReduction, gather_joined
from shardwise.comm.stats import Op
from shardwise.engine.bucket import Bucket
from shardwise.engine.commands import Command
from shardwise.engine.packing import Packing
from shardwise.engine.unit import Unit, values_change
from shardwise.tiers.transfer import Transfer

LOOK_AHEAD = 64  # units that one message may bring
_PACKINGS = 256  # kept; a model whose order changes all the time makes new ones

T = TypeVar("T")


def _by_kind(items: Iterable[T], kind: Callable[[T], Hashable]) -> list[list[T]]:
    out: dict[Hashable, list[T]] = {}
    for item in items:
        out.setdefault(kind(item), []).append(item)
    return list(out.values())


def by_bytes(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut a sequence into messages: what is small goes together, what is not goes alone."""
    message: list[T] = []
    total = 0
    for item in items:
        size = nbytes(item)
        if message and total + size > joined.JOINED_BYTES:
            yield message
            message, total = [], 0
        message.append(item)
        total += size
    if message:
        yield message


def _named(kind: str, buckets: Sequence[Bucket]) -> Op:
    first = buckets[0].op(kind)
    return Op(kind, f"{first.unit} to {buckets[-1].label}", first.number)


# --- reduces -----------------------------------------------------------------------------------------------
class Reduces:
    """Starts reduces of units, those of small ones in one message for each kind of buckets."""

    def __init__(self) -> None:
        self._packings: dict[tuple[int, ...], Packing] = {}  # by the buckets that a message is of, by ``id``

    def start(self, units: Iterable[Unit]) -> None:
        todo = [b for unit in units for b in unit.buckets if b.trains and not b.grads.are_summed()]
        for buckets in _by_kind(todo, lambda b: (b.reduce_dtype, b.master_dtype, b.device, id(b.mesh))):
            first = buckets[0]
            if len(buckets) == 1:
                first.grads.launch_reduce()
                continue
            loose = all(b.grads.are_loose for b in buckets)
            if loose:
                tensors = self._packing(buckets).ordered([grad for b in buckets for grad in b.grads.loose()])
            else:
                raws = [b.grads.take().chunk(first.mesh.parts) for b in buckets]
                tensors = [part for shard in zip(*raws, strict=True) for part in shard]
                del raws
            scale = first.share if loose else 1.0
            together = JoinedReduction(first.mesh, tensors, _named("reduce", buckets), first.ledger, scale)
            del tensors
            together.start([b.grads.reduce_with(together) for b in buckets])

    def _packing(self, buckets: Sequence[Bucket]) -> Packing:
        key = tuple([id(b) for b in buckets])
        found = self._packings.get(key)
        if found is None:
            if len(self._packings) >= _PACKINGS:
                self._packings.clear()
            found = self._packings[key] = Packing([b.layout for b in buckets])
        return found


# --- gathers -----------------------------------------------------------------------------------------------
def first_message(following: Sequence[Unit]) -> Sequence[Unit]:
    """Of the units to come, those that one message brings: the first, and what is small behind it."""
    if not following[0].joins:
        return following[:1]
    out: list[Unit] = []
    nbytes = 0
    for unit in following:
        nbytes += unit.gather_bytes
        if not unit.joins or unit.residence.coming or unit.updating or unit in out:
            break
        if out and nbytes > joined.JOINED_BYTES:
            break
        out.append(unit)
    return out


def start_gathers(units: Sequence[Unit]) -> None:
    """Begin to bring the values of released units in one message."""
    if len(units) == 1:
        units[0].start_gather()
        return
    for unit in units:
        unit.finish_update()
    with torch.no_grad(), units[0].upward.announce(Command.GATHER, [unit.index for unit in units]):
        coming = _gather([b for unit in units for b in unit.buckets if b.placement.released])
        for unit in units:
            unit.comes_with([coming[id(b)] for b in unit.buckets if b.placement.released])


@torch.no_grad()
def publish(changed: Sequence[tuple[Unit, Sequence[Bucket]]]) -> None:
    """After an optimizer step: let the values of units follow the master values of these buckets.

    What is all in one message is waited for: that takes less time than guarding the parameters would.
    """
    coming: dict[int, Transfer] = {}
    follow = []
    values_change([unit for unit, _ in changed])
    for unit, buckets in changed:
        unit.prepare_to_follow()
        follow += [b for b in buckets if b.gathers_after_step]
    messages = list(by_bytes(follow, lambda b: b.flat.nbytes))
    for message in messages:
        coming |= _gather(message)
    now = len(messages) == 1 and len(follow) > 1
    for unit, buckets in changed:
        unit.follow_with([coming[id(b)] for b in buckets if id(b) in coming], now=now)


def _gather(buckets: Sequence[Bucket]) -> dict[int, Transfer]:
    """Start to gather buckets, in one message for each kind of those that can be joined. By ``id`` of the bucket."""
    out: dict[int, Transfer] = {}
    for mine in _by_kind(buckets, lambda b: (b.dtype, b.device, b.sends_own, id(b.mesh)) if b.joins else id(b)):
        if len(mine) == 1:
            out[id(mine[0])] = mine[0].start_gather()
            continue
        first = mine[0]
        shards = [b.own_shard() for b in mine]
        places = _Places(mine)
        together = gather_joined(first.mesh, shards, places, _named("gather", mine), first.ledger, own=first.sends_own)
        out.update((id(b), together) for b in mine)
    return out


class _Places:
    """Where the values of several buckets go: memory that there is from the moment on at which they are here."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets

    def __call__(self) -> list[torch.Tensor]:
        for b in self.buckets:
            b.fill()
        return [b.flat.tensor for b in self.buckets]
