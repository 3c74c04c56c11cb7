"""Optimizer state with another home than the device: stepped shard by shard, while its neighbours move.

An *optimizer shard* is what one optimizer keeps of this rank's part of one bucket. The optimizer's own step runs once
per optimizer shard that has gradients, and sees that one's pieces only, in the order of the units::

    read i+1  |  update i  |  write i-1

State tensors stay the same objects. While an optimizer shard is updated they are views of one host buffer; in between
their bytes are in its extent on the disk, all of them in one run, and a look at them raises. The first update makes the
state as ever; it is laid out when that is done. Numbers of no dimension (step counters) stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim import Optimizer

from shardwise.engine.bucket import Bucket
from shardwise.engine.elementwise import unhooked
from shardwise.engine.failure import Failure
from shardwise.engine.scalings import Scaling, factors_of, lowered, scale_
from shardwise.errors import OptimizerError
from shardwise.tiers.aligned import padded, start_of
from shardwise.tiers.home import TENSOR_ALIGN, BufferLease, Home, StateExtent
from shardwise.tiers.link import StreamOrdered
from shardwise.tiers.planned import is_plain
from shardwise.tiers.swapped_tensor import SwapLocation, fetch, is_swapped, swap_in, swap_out
from shardwise.tiers.transfer import Transfer

State = Mapping[Any, dict[str, Any]]
"""``optimizer.state``."""
Found = list[tuple[torch.Tensor, str, torch.Tensor]]
"""Piece, key and state tensor."""


class StateSlot(NamedTuple):
    """Where one state tensor lies: of which piece (by ``id``), and ``start:stop`` bytes into the optimizer shard."""

    piece: int
    key: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    stop: int


def is_offloaded(bucket: Bucket, value: Any) -> bool:
    """Do this state's bytes leave the memory between steps?"""
    if not bucket.placement.state_on_disk or not isinstance(value, torch.Tensor):
        return False
    return is_swapped(value) or (is_plain(value) and value.dim() > 0 and value.numel() > 0)


def _slots(found: Found) -> tuple[list[StateSlot], int]:
    """Lay state tensors end to end; returns the length of all of them in bytes."""
    out: list[StateSlot] = []
    end = 0
    for piece, key, value in found:
        start = -(-end // TENSOR_ALIGN) * TENSOR_ALIGN
        end = start + value.numel() * value.element_size()
        out.append(StateSlot(id(piece), key, value.shape, value.dtype, start, end))
    return out, padded(end)


class CallDepth:
    """How many calls of one optimizer's step are under way, one inside the other: a step may call its base's."""

    def __init__(self) -> None:
        self.value = 0

    @contextmanager
    def nested(self) -> Iterator[None]:
        """The optimizer's own step runs inside the block, on pieces that are there already."""
        before, self.value = self.value, self.value + 1
        try:
            yield
        finally:
            self.value = before


class Owner(Protocol):
    """Whoever knows the optimizer of an optimizer shard."""

    depth: CallDepth
    failure: Failure | None

    def fail(self, error: BaseException, where: str) -> Failure:
        """An update failed: nobody uses the optimizer and its parameters before a checkpoint is loaded."""


class OptimizerShard:
    """What one optimizer keeps of this rank's part of one bucket.

    Args:
        bucket: if it has no home, an update is the optimizer's own and nothing moves.
        optimizer: its class's name, for reports.
        owner: hears of failures.
    """

    def __init__(self, bucket: Bucket, optimizer: str, owner: Owner) -> None:
        self.bucket, self.optimizer, self.owner = bucket, optimizer, owner
        self.slots: list[StateSlot] = []
        self.nbytes = 0  # of the state tensors; master values lie before them in a buffer
        self._values_bytes = 0 if bucket.values is None else bucket.values.nbytes
        n, on_host = bucket.master.numel(), bucket.placement.step_on_host
        plan = bucket.placement
        follows = plan.follows_home and (plan.params_on_disk or (on_host and not plan.params_offloaded))
        # What crosses the link or goes to the disk in the compute dtype: gradients, then values.
        self._low_bytes = padded(n * bucket.dtype.itemsize) if follows or (on_host and not bucket.grads.on_host) else 0
        # Gradients that are not where the update is: they cross in the compute dtype, and are widened there.
        self._grad_bytes = padded(n * bucket.master_dtype.itemsize) if on_host and not bucket.grads.on_host else 0
        self._device_grad: torch.Tensor | None = None
        self._state_extent: StateExtent | None = None
        self._lease: BufferLease | None = None
        self._grads_sent = False
        self._grads: torch.Tensor | None = None  # of an update to come
        self._scalings: tuple[Scaling, ...] = ()  # of the gradients that cross
        self._factors: torch.Tensor | None = None  # of these, on the host
        self._coming: list[Transfer] = []
        self.laid_out = False  # has there been an update, which made its state and gave it its place?

    @property
    def remote_grads(self) -> bool:
        """Do gradients come from the other side of the link?"""
        return self.bucket.placement.grads_cross

    def fail(self, error: BaseException) -> Failure:
        """Its update failed: the optimizer and its parameters are marked."""
        return self.owner.fail(error, f"unit {self.bucket.label}")

    # --- one update --------------------------------------------------------------------------
    @property
    def home(self) -> Home:
        assert self.bucket.home is not None
        return self.bucket.home

    def begin(self, values: bool = True, grads: bool = True) -> None:
        """Start to bring what is not on the host: state, and with ``values`` master values and gradients.

        Args:
            grads: they are reduced. Otherwise a second call, or :meth:`enter`, brings them.
        """
        send = values and grads and self.remote_grads and not self._grads_sent
        if send and not self.bucket.placement.step_on_host:
            held = self._held_grads()
            self._device_grad = torch.empty_like(held, device=self.bucket.device)
            copy = self.home.step_link.to_device(held, self._device_grad)
            self.bucket.grads.sent(copy)
            self._coming.append(StreamOrdered(copy))
            self._grads_sent = True
        if not (self._state_extent is not None or (values and (self._values_bytes > 0 or self._low_bytes > 0))):
            return
        if self._lease is None:
            self._lease = self._acquire_buffer()
            if values and self._values_bytes > 0:
                assert self.bucket.values is not None
                self._coming += self.bucket.values.read(self._lease.buffer)
            if self._state_extent is not None:
                self._coming += self._state_extent.read(self._mine)
        if send and self.bucket.placement.step_on_host:
            self._grads_sent = True
            self._send_grads()

    def take_grads(self) -> None:
        """Look for the gradients now: the update takes place in another thread."""
        self._grads = self.bucket.grads.held() if self.remote_grads else None
        self._scalings = self.bucket.grads.scaled() if self.remote_grads else ()

    def _send_grads(self) -> None:
        """To the host, in the compute dtype and as they were reduced: see :mod:`shardwise.engine.scalings`."""
        held, link = self._held_grads(), self.home.step_link
        if self._grads is None:
            self._scalings = self.bucket.grads.scaled()
        if self._low.dtype == held.dtype:
            self._scalings = ()
        self._factors, factors = None, factors_of(self._scalings, held)
        if factors is not None:
            self._factors = self.bucket.empty(factors.numel(), factors.dtype, on_host=True)
            self._coming.append(link.to_host(factors, self._factors))
        self._coming.append(link.to_host(lowered(held, self._scalings, self._low.dtype), self._low))

    def _held_grads(self) -> torch.Tensor:
        return self.bucket.grads.held() if self._grads is None else self._grads

    def enter(self, state: State, values: bool = True) -> None:
        """Have state and master values in memory."""
        self.begin(values)
        coming, self._coming = self._coming, []
        for transfer in coming:
            transfer.wait()
        if values and self.bucket.values is not None:
            self.bucket.values.settle()  # a forward between backward and step may have sent them to the device
        by_id = {id(piece): piece for piece in self._pieces}
        for slot in self.slots:
            value = state.get(by_id[slot.piece], {}).get(slot.key)
            if value is not None and is_swapped(value):  # otherwise somebody has put a new one in its place
                swap_in(value, self._view(slot))
        if values and self._values_bytes:
            assert self.bucket.values is not None and self._lease is not None
            self.bucket.values.swap_in(self._lease.buffer)

    def give_grads(self, pieces: Iterable[torch.Tensor]) -> None:
        """Gradients that have crossed the link go to the pieces."""
        if self._device_grad is not None:
            full = self._device_grad
        else:
            full = self._area(self._low_bytes, self._grad_bytes, self.bucket.master_dtype)
            full.copy_(self._low)
            scale_(full, self._scalings, self._factors)
        wanted = {id(piece) for piece in pieces}
        at = {id(p): k for p, k in zip(self._pieces, self.bucket.piece_starts, strict=True)}
        for piece in self._pieces:
            if id(piece) in wanted:
                start = at[id(piece)]
                piece.grad = full[start : start + piece.numel()].view(piece.shape)

    def leave(self, state: State, values: bool = True) -> None:
        """Let the parameters follow the master values, and start to write out what was in memory.

        Raises:
            OffloadError: the disk is full or failed.
            OptimizerError: state of a kind that cannot be moved.
        """
        writes: list[Transfer] = []
        self.laid_out = self.laid_out or values
        if values:
            if self.remote_grads:
                for piece in self._pieces:
                    piece.grad = None
            writes += self.bucket.follow_master(self._low if self._low_bytes else None)
        if not self.bucket.placement.state_on_disk and not self._values_bytes:
            self._release(writes)
            return
        values = values and self._values_bytes > 0
        found = self._found(state)
        slots, nbytes = _slots(found)
        moved = slots != self.slots
        if moved:
            for transfer in writes:
                transfer.wait()
            writes.clear()
            self._lay_out(slots, nbytes, found, values)
        if self._lease is None:
            return
        if values:
            assert self.bucket.values is not None
            writes += self.bucket.values.write(self._lease.buffer)
            self.bucket.values.swap_out()
        if self._state_extent is not None:
            for slot, (_, _, value) in zip(self.slots, found, strict=True):
                view = self._view(slot)
                if start_of(value) != start_of(view):
                    view.copy_(value)
            writes += self._state_extent.write(self._mine)
            for slot, (_, key, value) in zip(self.slots, found, strict=True):
                what = f"state '{key}' of {self.optimizer}, unit {self.bucket.label},"
                swap_out(value, SwapLocation(self._state_extent, slot.start, what))
        self._release(writes)
        self.home.trim(now=moved)

    def _release(self, after: Sequence[Transfer] = ()) -> None:
        self._grads_sent, self._device_grad, self._grads = False, None, None
        self._scalings, self._factors = (), None
        if self._lease is not None:
            lease, self._lease = self._lease, None
            lease.release(after)

    def cancel(self) -> None:
        """Forget what was begun; nothing, if the update took place."""
        coming, self._coming = self._coming, []
        self._release(coming)

    def abandon(self, state: State) -> None:
        """An update failed half way: no tensor stays in a buffer that is lent again, and nothing is laid out any more.

        What they hold is of no use; a load replaces it.
        """
        self.cancel()
        for _, _, value in self._found(state):
            if not is_swapped(value):
                value.data = value.clone()
        values = self.bucket.values
        if values is not None and values.on_disk and values.resident:
            values.swap_in(values.tensor.clone().view(torch.uint8))
        self.slots, self.nbytes, self._state_extent, self.laid_out = [], 0, None, False

    # --- outside of updates --------------------------------------------------------------------
    def materialise(self, state: State) -> None:
        """Have the state in memory of its own until :meth:`flush`."""
        for _, _, value in self._found(state):
            if is_swapped(value):
                swap_in(value, fetch(value))

    def flush(self, state: State) -> None:
        """Write out state that is in memory, because it was materialised, loaded or made by hand."""
        in_memory = (not is_swapped(value) for _, _, value in self._found(state))
        if self.bucket.placement.state_on_disk and any(in_memory):
            self.enter(state, values=False)
            self.leave(state, values=False)

    # --- layout ------------------------------------------------------------------------------
    @property
    def _pieces(self) -> Iterator[torch.Tensor]:
        return (piece for pieces in self.bucket.piece_params for piece in pieces)

    def _acquire_buffer(self) -> BufferLease:
        return self.home.lease(self._values_bytes + self.nbytes + self._low_bytes + self._grad_bytes)

    def _area(self, after: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """What lies ``after`` bytes behind master values and state, one element per element of the held shards."""
        assert self._lease is not None
        start = self._values_bytes + self.nbytes + after
        return self._lease.buffer[start : start + nbytes].view(dtype)[: self.bucket.master.numel()]

    @property
    def _low(self) -> torch.Tensor:
        return self._area(0, self._low_bytes, self.bucket.dtype)

    @property
    def _mine(self) -> torch.Tensor:
        assert self._lease is not None
        return self._lease.buffer[self._values_bytes : self._values_bytes + self.nbytes]

    def _view(self, slot: StateSlot) -> torch.Tensor:
        return self._mine[slot.start : slot.stop].view(slot.dtype).view(slot.shape)

    def _found(self, state: State) -> Found:
        out: Found = []
        for piece in self._pieces:
            for key, value in state.get(piece, {}).items():
                if is_offloaded(self.bucket, value):
                    out.append((piece, key, value))
                elif not self.bucket.placement.state_on_disk:
                    continue
                elif (large := _elements(value)) > piece.numel() // 2 and large > 1:
                    raise OptimizerError(
                        f"its state '{key}' is a {type(value).__name__} with {large} elements, which cannot be moved",
                        where=f"{self.optimizer}, unit {self.bucket.label}",
                        fix="offload_optimizer=cpu, or an optimizer whose state is plain tensors",
                    )
        return out

    def _lay_out(self, slots: list[StateSlot], nbytes: int, found: Found, values: bool) -> None:
        """There is other state than before: make room for it. Everything leaves the buffer it was in."""
        master = self.bucket.values
        for _, _, value in found:
            if is_swapped(value):
                swap_in(value, fetch(value))
            elif self._lease is not None:
                value.data = value.clone()
        kept = None
        if values:
            assert master is not None
            kept = master.tensor.clone().view(torch.uint8)
            master.swap_in(kept)
        self._release()
        self.slots, self.nbytes, self._state_extent = slots, nbytes, None
        if nbytes:
            self._state_extent = StateExtent(self.home, f"unit {self.bucket.label}, {self.optimizer}", nbytes)
        self._lease = self._acquire_buffer()
        if kept is not None:
            assert master is not None
            self._lease.buffer[: kept.numel()].copy_(kept)
            master.swap_in(self._lease.buffer)


def _elements(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(_elements(item) for item in items)


# --- a step ------------------------------------------------------------------------------------------
Pieces = Sequence[Sequence[tuple[torch.Tensor, Bucket | None]]]
"""Per parameter group, what it holds for the length of a step; ``None``: a plain parameter."""


def shards_to_update(
    pieces: Pieces, remote: Set[int], shard_of: Callable[[Bucket], OptimizerShard]
) -> list[OptimizerShard]:
    """The optimizer shards with another home that have gradients, in the order of the units.

    Args:
        pieces: with their gradients set.
        remote: pieces, by ``id``, whose gradients are on the other side of the link.
        shard_of: gives the optimizer's shard of a bucket.
    """
    offloaded = [(p, b) for group in pieces for p, b in group if b is not None and b.home is not None]
    buckets = {id(b): b for p, b in offloaded if p.grad is not None or id(p) in remote}
    return [shard_of(b) for b in sorted(buckets.values(), key=_place)]


def step(optimizer: Optimizer, todo: Sequence[OptimizerShard], pieces: Pieces, remote: Set[int]) -> None:
    """Update now, and leave what has no home in ``param_groups`` for the step that is about to run.

    Args:
        todo: what is updated.
        pieces, remote: see :func:`shards_to_update`.
    """
    try:
        _each(optimizer, todo, pieces, remote)
    finally:
        for shard in todo:
            shard.cancel()
    for group, held in zip(optimizer.param_groups, pieces, strict=True):
        group["params"] = [p for p, b in held if b is None or b.home is None]


def pieces_of(
    shard: OptimizerShard, pieces: Pieces, remote: Set[int]
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """An optimizer shard's pieces per group, and those of them whose gradients are on the other side of the link."""
    mine = [[p for p, b in held if b is shard.bucket] for held in pieces]
    return mine, [p for held in mine for p in held if id(p) in remote]


def _each(optimizer: Optimizer, todo: Sequence[OptimizerShard], pieces: Pieces, remote: Set[int]) -> None:
    """One after the other; what a step changes in the optimizer's groups is as if it had not."""
    after: list[dict[str, Any]] | None = None
    for k, shard in enumerate(todo):
        try:
            shard.begin()
            if k + 1 < len(todo) and shard.home.buffers > 1:
                todo[k + 1].begin()
            shard.bucket.finish_transfers()
            mine, on_the_way = pieces_of(shard, pieces, remote)
            changed = update(optimizer, shard, mine, on_the_way)
            if after is not None and not _equal(after, changed):
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps numbers in its groups that depend on all parameters together",
                    fix="it cannot be stepped unit by unit: leave offloading and optimizer_in_backward out",
                )
        except BaseException as error:
            shard.fail(error)
            raise
        after = changed


def update(
    optimizer: Optimizer, shard: OptimizerShard, pieces: Sequence[list[torch.Tensor]], remote: Sequence[torch.Tensor]
) -> list[dict[str, Any]]:
    """Run the optimizer's own step on the pieces of one optimizer shard.

    Args:
        pieces: per parameter group, with their gradients set; left in ``param_groups``.
        remote: those whose gradients are on the other side of the link.

    Returns:
        The groups' settings as the step left them. They are put back: what a step changes in its groups (some count
        there) it changes once, not once per optimizer shard.
    """
    groups = optimizer.param_groups
    before = [settings_of(group) for group in groups]
    step = unhooked(type(optimizer).step)
    try:
        shard.enter(optimizer.state)
        try:
            if shard.remote_grads:
                shard.give_grads(remote)
            for group, mine in zip(groups, pieces, strict=True):
                group["params"] = mine
            step(optimizer)
        finally:
            shard.leave(optimizer.state)
    except BaseException:
        shard.abandon(optimizer.state)
        raise
    changed = [settings_of(group) for group in groups]
    for group, values in zip(groups, before, strict=True):
        for key in [key for key in group if key != "params" and key not in values]:
            del group[key]
        group.update(values)
    return changed


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _equal(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x is y or torch.equal(x, y)
        return x is y or bool(x == y)

    return all(x.keys() == y.keys() and all(same(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


def _place(bucket: Bucket) -> int:
    """In the order in which buckets were made, which all ranks share."""
    return bucket.place
