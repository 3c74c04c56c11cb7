"""``gathered()``: the whole values of a sharded module, for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from shardwise.comm.stats import Op
from shardwise.engine.bucket import Bucket
from shardwise.engine.residency import Pin
from shardwise.engine.unit import Unit, unit_of
from shardwise.errors import WriteLost

_VOTE = 4  # below the tags of units; see operations and data_loader for the others


@contextmanager
def gathered(
    module: nn.Module | Iterable[nn.Parameter],
    *,
    write: bool = False,
    grads: bool = False,
    source: int = 0,
    one_by_one: bool = False,
) -> Iterator[None]:
    """Have the whole values of a sharded module, or of a submodule, on every rank.

    Args:
        module: the sharded module, a module inside one, or parameters: their units' values come.
        write: take changed values of these parameters over (rank ``source``'s, for everyone) when the block ends.
            Values that were not changed keep their master values to the last bit, also where values have fewer bits.
            If the block raises, nothing is taken over.
        grads: show whole reduced gradients in ``p.grad`` meanwhile. Changes to them are not kept.
        one_by_one: a loop over parameters has such a block for each. The unit that came with the last one stays until
            a block needs another one, or a pass or a step lets go of it: its values cross the wire once.

    Raises:
        WriteLost: values were written to without ``write``, or beside the parameters that were asked for.

    A collective: every rank enters. Blocks may be nested, with steps inside. Costs the module's whole values in
    memory; with ``write`` and values that stay (``ddp``, ``zero1``, ``zero2``) a copy of them.
    """
    params = list(module.parameters() if isinstance(module, nn.Module) else module)
    chosen = {id(u): u for p in params if (u := unit_of(p)) is not None}
    units: list[Unit] = sorted(chosen.values(), key=lambda u: u.index)
    stays: list[Unit] = []  # if the block ends well
    if write:
        for bucket in (b for u in units for b in u.buckets):
            bucket.require_writable()
    reason = Pin.WRITING if write else Pin.READING
    engines = {id(u.upward): u.upward for u in units}.values()
    for engine in engines:
        engine.let_go_of_last(units)
    with ExitStack() as stack:
        for unit in units:
            unit.reconcile()
            unit.finish_transfers()
            unit.gather()
            unit.residence.pin(reason)
            stack.callback(_leave, unit, reason, stays)
        before = _Before(units) if write else None
        shown = _show_grads(units) if grads else []
        stack.callback(_put_back, shown)
        for engine in engines:
            stack.enter_context(engine.saving())
        try:
            yield
        except BaseException:
            if before is not None:
                before.restore()
            raise
        for engine in engines:
            engine.check()
        if write:
            _take_over(units, source, {id(p) for p in params}, before)
        else:
            _refuse_writes(units)
        if one_by_one and len(units) == 1 and units[0].released:
            stays += units


def _leave(unit: Unit, reason: Pin, stays: Sequence[Unit]) -> None:
    unit.residence.unpin(reason)
    if unit in stays and unit.here and not unit.residence.pinned() and unit.failure is None:
        unit.upward.last_gathered = unit
    else:
        unit.release()
    unit.watch()


def _show_grads(units: Sequence[Unit]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    shown: list[tuple[nn.Parameter, torch.Tensor]] = []
    for unit in units:
        for bucket in unit.buckets:
            if not bucket.grads.shows_handles or all(p.grad is None for p in bucket.params):
                continue
            full = unit.full_grads(bucket)
            for slot, p in zip(bucket.layout.slots, bucket.params, strict=True):
                if p.grad is not None:
                    shown.append((p, p.grad))
                    p.grad = full[slot.offset : slot.stop].view(slot.shape)
    return shown


def _put_back(shown: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for p, grad in shown:
        p.grad = grad


class _Before:
    """Values as they were when a block began that may write to them."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._kept = [(u, b, b.flat.tensor.clone()) for u in units for b in u.buckets if not b.placement.released]
        self._units = units

    @torch.no_grad()
    def restore(self) -> None:
        """The block raised: nothing that it wrote is taken over."""
        for _, b, values in self._kept:
            b.flat.tensor.copy_(values)
        for unit in self._units:
            for b in unit.buckets:
                if b.placement.released and b.written() and unit.residence.pinned() > 1:
                    _gather_again(unit)  # a block around this one reads on
                b.note()


@torch.no_grad()
def _take_over(units: Sequence[Unit], source: int, wanted: Collection[int], before: _Before | None) -> None:
    """Rank ``source``'s values of parameters (by ``id``) for everyone, and the master values follow."""
    _refuse_beside(units, wanted, before)
    for unit in units:
        unit.finish_transfers()
        for b in unit.buckets:
            for start, stop in _runs(b, wanted):
                b.mesh.whole.broadcast(b.flat.tensor[start:stop], b.op("broadcast"), source).wait()
            b.take_values()


def _runs(b: Bucket, wanted: Collection[int]) -> list[tuple[int, int]]:
    """Where parameters (by ``id``) lie in a bucket's flat buffer, neighbours together."""
    if all(id(p) in wanted for p in b.params):
        return [(0, b.flat.tensor.numel())]
    runs: list[tuple[int, int]] = []
    follows = False
    for slot, p in zip(b.layout.slots, b.params, strict=True):
        if id(p) in wanted:
            runs.append((runs.pop()[0] if follows else slot.offset, slot.stop))
        follows = id(p) in wanted
    return runs


def _refuse_beside(units: Sequence[Unit], wanted: Collection[int], before: _Before | None) -> None:
    """Writes to values that came along and go again would reach the ranks that hold them, and no other."""
    came = [b for u in units for b in u.buckets if b.placement.released]
    beside = [b for b in came if not all(id(p) in wanted for p in b.params)]
    odd = [b.names[i] for b in beside for i in b.written() if id(b.params[i]) not in wanted]
    if not beside or not _any_rank(units[0], bool(odd)):
        return
    if before is not None:
        before.restore()
    raise WriteLost(
        "values were written to that only came along: the block was asked for others",
        where=f"parameter '{odd[0]}'" if odd else "on another rank",
        fix="name all parameters that are written to",
    )


def _gather_again(unit: Unit) -> None:
    unit.publish([])


@torch.no_grad()
def _refuse_writes(units: Sequence[Unit]) -> None:
    """Values were here to be read. Those that stay may be written to at any time; the others would be lost.

    A write past the counter of writes (``p.data.fill_()``) is seen by the rank that holds the shard. It tells the rest.
    """
    # Inside of a block that writes, that one takes over what is written.
    reads = [u for u in units if u.released and u.here and not u.residence.pinned(Pin.WRITING)]
    found = ""
    for unit in reads:
        for b in (b for b in unit.buckets if b.placement.released):
            written = b.written()
            if written or b.differs():
                found = found or f"unit {unit.label}, parameter '{b.names[written[0] if written else 0]}'" + (
                    "" if written else " or one beside it"
                )
    if not reads or not _any_rank(reads[0], bool(found)):
        return
    for unit in reads:
        for b in unit.buckets:
            b.note()
        if unit.residence.pinned() > 1:
            _gather_again(unit)
    raise WriteLost(
        "values were written to inside gathered(), which only reads: an in-place modification that is lost",
        where=found or "on another rank",
        fix="with shardwise.gathered(module, write=True): rank 0's values then count, on every rank",
    )


def _any_rank(unit: Unit, flag: bool) -> bool:
    """Does any rank say so?"""
    world, group = unit.mesh.world, unit.mesh.control
    if group.size == 1 or world.fake or world.join is not None:
        return flag
    votes = torch.zeros(group.size, dtype=torch.uint8)
    votes[group.rank] = flag
    group.all_gather(votes, Op("control", "the end of gathered()", _VOTE)).wait()
    return bool(votes.any())
