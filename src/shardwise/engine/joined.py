"""Small units travel together: their reduces, and their gathers.

What goes into one message is decided by the order of units and by their sizes, which are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from shardwise.comm import joined
from shardwise.comm.joined import JoinedReduction, gather_joined
from shardwise.comm.stats import Op
from shardwise.engine.batch import Batch
from shardwise.engine.bucket import Bucket
from shardwise.engine.commands import Command
from shardwise.engine.packing import Packing
from shardwise.engine.unit import Unit, values_change
from shardwise.tiers.transfer import Transfer

LOOK_AHEAD = 64  # units that one message may bring
_KEPT = 256  # messages that are remembered; a model whose order changes all the time makes new ones

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
        self._batches: dict[tuple[int, ...], list[Batch] | None] = {}  # by units, by ``id``

    def take(self, units: Sequence[Unit]) -> list[Batch] | None:
        """Start reduces of units whose gradients are in ``p.grad``, and of which there were none before.

        Returns:
            What is under way; ``None``: some of them have no gradient here, or take another way. Nothing has happened.
        """
        key = tuple(map(id, units))
        if key not in self._batches:
            _make_room(self._batches)
            self._batches[key] = self._batches_of(units)
        batches = self._batches[key]
        if batches is None or not all(batch.look() for batch in batches):
            return None
        for batch in batches:
            batch.start()
        return batches

    def _batches_of(self, units: Sequence[Unit]) -> list[Batch] | None:
        buckets = [b for unit in units for b in unit.buckets]
        kinds = _by_kind(buckets, _kind)
        if not all(b.grads.stays for b in buckets) or any(len(mine) == 1 for mine in kinds):
            return None
        return [Batch(mine, self._packing(mine), _named("reduce", mine)) for mine in kinds]

    def start(self, units: Iterable[Unit]) -> None:
        """Start reduces of what units have taken."""
        todo = [b for unit in units for b in unit.buckets if b.trains and not b.grads.are_summed()]
        for buckets in _by_kind(todo, _kind):
            first = buckets[0]
            if len(buckets) == 1:
                first.grads.launch_reduce()
                continue
            packing = self._packing(buckets)
            if all(b.grads.are_loose for b in buckets) and packing.idle:
                packed = packing.pack([grad for b in buckets for grad in b.grads.loose()], first.share)
                free = packing.free
            else:
                raws = [b.grads.take().chunk(first.mesh.parts) for b in buckets]
                tensors = [part for shard in zip(*raws, strict=True) for part in shard]
                del raws
                numel = sum([tensor.numel() for tensor in tensors])
                packed = first.ledger.empty(numel, first.reduce_dtype, first.device, "gather_buffers")
                torch.cat(tensors, out=packed)
                del tensors
                free = partial(first.ledger.drop, packed, "gather_buffers")
            together = JoinedReduction(first.mesh, packed, _named("reduce", buckets), first.ledger, free)
            copies = len(first.mesh.held)
            together.start([b.grads.reduce_with(together).view(copies, -1) for b in buckets])

    def _packing(self, buckets: Sequence[Bucket]) -> Packing:
        key = tuple(map(id, buckets))
        found = self._packings.get(key)
        if found is None:
            _make_room(self._packings)
            first = buckets[0]
            layouts = [b.layout for b in buckets]
            found = self._packings[key] = Packing(layouts, first.reduce_dtype, first.device, first.ledger)
        return found


def _kind(b: Bucket) -> Hashable:
    return b.reduce_dtype, b.master_dtype, b.device, id(b.mesh)


def _make_room(table: dict[Any, Any]) -> None:
    if len(table) >= _KEPT:
        table.clear()


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
    values_change([unit for unit, _ in changed])
    for unit, _ in changed:
        if unit.released or not unit.here:
            unit.prepare_to_follow()
    follow = [b for _, buckets in changed for b in buckets if b.gathers_after_step]
    if not follow:
        return
    messages = list(by_bytes(follow, lambda b: b.flat.nbytes))
    for message in messages:
        coming |= _gather(message)
    if len(messages) == 1 and len(follow) > 1:
        for transfer in coming.values():  # as a rule one, of all of them
            transfer.wait()
        return
    for unit, buckets in changed:
        unit.follow_with([coming[id(b)] for b in buckets if id(b) in coming])


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
        return [b.filled() for b in self.buckets]
