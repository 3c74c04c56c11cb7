"""The mesh of ranks: a *shard* axis that splits the states and a *replicate* axis that repeats them.

Rank ``r`` stands at row ``r // S`` (replicate) and column ``r % S`` (shard). Every flat buffer has one
shard per rank of the world; column ``s`` *holds* the ``R`` consecutive shards ``s*R .. (s+1)*R``.
``ddp`` is S = 1 (everyone holds everything), ZeRO is R = 1, ``hsdp`` is the mixture: one code path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from shardwise.comm.group import Group, Op, Transfer, reduce_scatter_builtin
from shardwise.comm.world import World

_COPIES = 1 << 24  # tags of copied models begin here


class Memory(Protocol):
    """Where a reduce gets the memory it receives into (the engine's ledger)."""

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device, state: str) -> torch.Tensor: ...
    def drop(self, tensor: torch.Tensor, state: str) -> None: ...


class Mesh:
    """Shard and replicate groups of this rank.

    Args:
        world: the process-wide facts.
        whole, shard, replicate: the groups this rank belongs to.
    """

    def __init__(self, world: World, whole: Group, shard: Group, replicate: Group, control: Group) -> None:
        self.world, self.whole, self.shard, self.replicate, self.control = world, whole, shard, replicate, control
        self.parts = whole.size
        self.first_held = shard.rank * replicate.size
        self._tags = self._copy_tags = 0
        # Which shard each rank reduces: column s, row r takes shard s*R + r, so that the R shards of a
        # column end up in row order, ready to be gathered along the replicate axis.
        self._reduces = [(r % shard.size) * replicate.size + r // shard.size for r in range(whole.size)]

    def new_tag(self) -> int:
        """A tag that no other unit of this mesh uses; equal on all ranks that shard in the same order."""
        self._tags += 1
        return self._tags

    def new_copy_tag(self) -> int:
        """As :meth:`new_tag`, from a range of its own: a model that is copied on one rank only moves nobody's tags."""
        self._copy_tags += 1
        return _COPIES + self._copy_tags

    @property
    def held(self) -> range:
        """The shards this rank holds when a state is split."""
        return range(self.first_held, self.first_held + self.replicate.size)

    def gather(self, flat: torch.Tensor, op: Op) -> Transfer:
        """All-gather along the shard axis into ``flat`` ``(parts * n,)``, in place."""
        return self.shard.all_gather(flat, op)

    def reduce(self, raw: torch.Tensor, out: torch.Tensor, op: Op, memory: Memory) -> Reduction:
        """Sum ``raw`` ``(parts * n,)`` over the world into ``out`` ``(R * n,)``: the held shards.

        ``out`` may be a view of ``raw`` at the held shards. Sends ``(W-1)/W`` of ``raw``, plus
        ``(R-1)/W`` along the replicate axis. Sums run in rank order and in the dtype of ``out``.
        """
        self.whole.allow(op)
        return Reduction(self, raw, out, op, memory)


class Reduction:
    """A reduce in flight: first summed to one shard per rank, then spread along the replicate axis.

    ``advance()`` finishes the first stage and starts the second, so that a schedule may call it while
    other work is under way; ``wait()`` finishes both.
    """

    __slots__ = ("_first", "_second", "memory", "mesh", "op", "out", "raw", "received", "sources")

    def __init__(self, mesh: Mesh, raw: torch.Tensor, out: torch.Tensor, op: Op, memory: Memory) -> None:
        self.mesh, self.raw, self.out, self.op, self.memory = mesh, raw, out, op, memory
        self.sources: list[torch.Tensor] = []
        self.received: list[torch.Tensor] = []
        self._second: Transfer | None = None
        self._first: Transfer | None = self._start_builtin() if mesh.whole.builtin else self._start_ordered()

    # --- rank-ordered sums over sends and receives --------------------------------------------
    def _start_ordered(self) -> Transfer:
        mesh, group = self.mesh, self.mesh.whole
        n = self.raw.numel() // mesh.parts
        chunk = [self.raw[s * n : (s + 1) * n] for s in mesh._reduces]  # by rank that reduces it
        mine = chunk[group.rank]
        if group.size == 1:
            self.sources = [mine]
            return Transfer(None, None)
        self.received = [self._take(n) for _ in group.peers()]
        spare = iter(self.received)
        self.sources = [mine if r == group.rank else next(spare) for r in range(group.size)]
        recvs = [(self.sources[r], r) for r in reversed(group.peers())]
        sends = [(chunk[r], r) for r in group.peers()]
        return Transfer(group, self.op, group.exchange(sends, recvs, self.op))

    def _sum_ordered(self) -> None:
        n = self.raw.numel() // self.mesh.parts
        row = self.mesh.replicate.rank
        out = self.out[row * n : (row + 1) * n]
        first, *between = self.sources
        last = between.pop() if between else None
        total = first if first.dtype == out.dtype else first.to(out.dtype)
        for source in between:
            total.add_(source)
        # ``out`` may be this rank's own source, so it is written by the very last sum only.
        if last is not None:
            torch.add(total, last, out=out)
        elif total.data_ptr() != out.data_ptr():
            out.copy_(total)
        self._give_back()

    # --- the backend's own -------------------------------------------------------------------
    def _start_builtin(self) -> Transfer:
        mesh, raw = self.mesh, self.raw
        whole, shard = mesh.whole, mesh.shard
        if whole.size == 1:
            return Transfer(None, None, (), lambda: self._store(raw))
        if shard.size == 1:
            whole._count(self.op, 2 * (whole.size - 1) * raw.numel() * raw.element_size() // whole.size)
            work = dist.all_reduce(raw, group=whole.pg, async_op=True)
            return Transfer(whole, self.op, [work], lambda: self._store(raw))
        part = self._take(raw.numel() // shard.size)
        self.received = [part]
        shard._count(self.op, (shard.size - 1) * part.numel() * part.element_size())
        work = reduce_scatter_builtin(part, raw, shard.pg)
        return Transfer(shard, self.op, [work], lambda: self._store(part))

    def _store(self, total: torch.Tensor) -> None:
        if total.data_ptr() != self.out.data_ptr() or total.dtype != self.out.dtype:
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
        mesh = self.mesh
        if not mesh.whole.builtin:
            with torch.no_grad():
                self._sum_ordered()
            self._second = mesh.replicate.all_gather(self.out, self.op)
        elif mesh.replicate.size > 1 and mesh.shard.size > 1:
            group = mesh.replicate
            group._count(self.op, 2 * (group.size - 1) * self.out.numel() * self.out.element_size() // group.size)
            self._second = Transfer(group, self.op, [dist.all_reduce(self.out, group=group.pg, async_op=True)])

    def wait(self) -> None:
        self.advance()
        if self._second is not None:
            self._second.wait()
            self._second = None


def build_mesh(world: World, shard_size: int, timeout: float, make_group: Callable[[list[list[int]]], Group]) -> Mesh:
    """Groups for a world cut into columns of ``shard_size`` ranks. Collective: every rank calls it."""
    size, cut = world.size, shard_size
    rows = [list(range(r * cut, (r + 1) * cut)) for r in range(size // cut)]
    columns = [list(range(c, size, cut)) for c in range(cut)]
    everyone = list(range(size))
    whole = make_group([everyone])
    shard = whole if cut == size else make_group(rows)
    replicate = whole if cut == 1 else make_group(columns)
    return Mesh(world, whole, shard, replicate, world.control_group(timeout))
