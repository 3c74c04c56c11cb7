"""Reduces over a mesh: sums in rank order, one shard per rank, spread along the replicate axis."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from shardwise.comm.group import Group, Transfer
from shardwise.comm.shared_memory import Message
from shardwise.comm.stats import Op


class Memory(Protocol):
    """Where a reduce gets the memory it receives into (the engine's ledger)."""

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device, state: str) -> torch.Tensor: ...
    def drop(self, tensor: torch.Tensor, state: str) -> None: ...


class Axes(NamedTuple):
    """The groups of a mesh that a reduce goes over.

    Args:
        order: by rank of ``whole``, the shard that it sums.
    """

    whole: Group
    shard: Group
    replicate: Group
    order: list[int]


class Reduction:
    """A reduce in flight: first summed to one shard per rank, then spread along the replicate axis.

    ``advance()`` finishes the first stage and starts the second, so that a schedule may call it while
    other work is under way; ``wait()`` finishes both.
    """

    __slots__ = ("_first", "_second", "axes", "memory", "op", "out", "raw", "received", "sources")

    def __init__(self, axes: Axes, raw: torch.Tensor, out: torch.Tensor, op: Op, memory: Memory) -> None:
        self.axes, self.raw, self.out, self.op, self.memory = axes, raw, out, op, memory
        self.sources: list[torch.Tensor | Message] = []
        self.received: list[torch.Tensor] = []
        self._second: Transfer | None = None
        self._first: Transfer | None = self._start_builtin() if axes.whole.builtin else self._start_ordered()

    @property
    def _out_is_free(self) -> bool:
        """May what is received go where the sum goes? With two ranks a reduce takes no memory of its own then."""
        out, raw = self.out, self.raw
        return out.dtype == raw.dtype and out.untyped_storage()._cdata != raw.untyped_storage()._cdata

    # --- rank-ordered sums over sends and receives --------------------------------------------
    def _start_ordered(self) -> Transfer:
        group = self.axes.whole
        n = self.raw.numel() // group.size
        chunk = [self.raw[s * n : (s + 1) * n] for s in self.axes.order]  # by rank that reduces it
        mine = chunk[group.rank]
        if group.size == 1:
            self.sources = [mine]
            return Transfer(None, None)
        row = self.axes.replicate.rank
        seen = {r: message for r in group.peers() if (message := group.arrival(r, mine))}
        sent = [r for r in group.peers() if r not in seen]
        into = [self.out[row * n : (row + 1) * n]] if self._out_is_free and sent else []
        self.received = [self._take(n) for _ in sent[len(into) :]]
        places = seen | dict(zip(sent, [*into, *self.received], strict=True))
        self.sources = [mine if r == group.rank else places[r] for r in range(group.size)]
        recvs = [(places[r], r) for r in reversed(group.peers())]
        sends = [(chunk[r], r) for r in group.peers()]
        return Transfer(group, self.op, group.swap(sends, recvs, self.op))

    def _sum_ordered(self) -> None:
        n = self.raw.numel() // self.axes.whole.size
        row = self.axes.replicate.rank
        out = self.out[row * n : (row + 1) * n]
        first, *between = (source.tensor if isinstance(source, Message) else source for source in self.sources)
        last = between.pop() if between else None
        total = first if first.dtype == out.dtype else first.to(out.dtype)
        for source in between:
            total.add_(source)
        # ``out`` may be one of the sources, so it is written by the very last sum only.
        if last is not None:
            torch.add(total, last, out=out)
        elif not _same(total, out):
            out.copy_(total)
        for place in self.sources:
            if isinstance(place, Message):
                place.release()
        self._give_back()

    # --- the backend's own -------------------------------------------------------------------
    def _start_builtin(self) -> Transfer:
        raw, whole, shard = self.raw, self.axes.whole, self.axes.shard
        if whole.size == 1:
            return Transfer(None, None, (), lambda: self._store(raw))
        if shard.size == 1:
            whole._count(self.op, 2 * (whole.size - 1) * raw.numel() * raw.element_size() // whole.size)
            work = whole.start_all_reduce(raw)
            return Transfer(whole, self.op, [work], lambda: self._store(raw))
        if self._out_is_free:
            part = self.out
        else:
            part = self._take(raw.numel() // shard.size)
            self.received = [part]
        shard._count(self.op, (shard.size - 1) * part.numel() * part.element_size())
        work = shard.start_reduce_scatter(part, raw)
        return Transfer(shard, self.op, [work], lambda: self._store(part))

    def _store(self, total: torch.Tensor) -> None:
        if not _same(total, self.out):
            self.out.copy_(total)
        self._give_back()

    # --- memory ------------------------------------------------------------------------------
    def _take(self, numel: int) -> torch.Tensor:
        return self.memory.empty(numel, self.raw.dtype, self.raw.device, "gather_buffers")

    def _give_back(self) -> None:
        for tensor in self.received:
            self.memory.drop(tensor, "gather_buffers")
        self.received, self.sources = [], []

    # --- stages ------------------------------------------------------------------------------
    def advance(self) -> None:
        if self._first is None:
            return
        self._first.wait()
        self._first = None
        axes = self.axes
        if not axes.whole.builtin:
            with torch.no_grad():
                self._sum_ordered()
            self._second = axes.replicate.all_gather(self.out, self.op)
        elif axes.replicate.size > 1 and axes.shard.size > 1:
            group = axes.replicate
            group._count(self.op, 2 * (group.size - 1) * self.out.numel() * self.out.element_size() // group.size)
            self._second = Transfer(group, self.op, [group.start_all_reduce(self.out)])
        self.raw = self.out  # what was sent is not needed any more

    def wait(self) -> None:
        self.advance()
        if self._second is not None:
            self._second.wait()
            self._second = None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Are they the same elements? Without asking for addresses, which tensors without values have not."""
    return (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
        and one.dtype == other.dtype
    )
