"""Thin collectives over one process group.

gloo's own collectives leave most of the wire unused (64 MiB over two ranks: all-gather 116 ms built in,
29 ms as point-to-point sends; reduce-scatter is an all-reduce underneath). On gloo every collective here is
therefore a set of tagged sends and receives, and sums are taken in rank order, which makes them
deterministic and equal under every strategy. The tag names the unit, so two ranks that disagree about
what comes next never exchange the wrong bytes: they wait, and the wait ends in a report.
Between ranks of one host long messages lie in memory that both see (:mod:`~shardwise.comm.shared_memory`).
On NCCL (and on the fake backend used for planning) the built-in collectives are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
import torch.distributed as dist

from shardwise import events
from shardwise.comm.process import Process
from shardwise.comm.shared_memory import SHORTEST, Message
from shardwise.comm.stats import Op
from shardwise.errors import CommError

_TO_NOBODY = (1 << 31) - 1  # a tag that nobody receives


class Transfer:
    """Bytes on their way. ``wait()`` returns when they have arrived (on a device: orders the current
    stream after them) and may be called any number of times."""

    __slots__ = ("after", "done", "group", "op", "started", "works")

    def __init__(
        self, group: Group | None, op: Op | None, works: Sequence[object] = (), after: Callable[[], None] | None = None
    ) -> None:
        self.group, self.op, self.works, self.after = group, op, works, after
        self.done = False
        self.started = perf_counter()

    def wait(self) -> None:
        if self.done:
            return
        self.done = True
        if self.works:
            assert self.group is not None and self.op is not None
            works, self.works = self.works, ()
            self.group.wait(works, self.op)
        if self.after is not None:
            after, self.after = self.after, None
            after()

    def __del__(self) -> None:
        """Of a model that was dropped: other ranks still want these bytes, and gloo forgets what nobody holds."""
        if self.works and self.group is not None:
            self.group.world.keep(self.works)


def _announced(payload: torch.Tensor | Message) -> torch.Tensor:
    """What crosses the wire: it, or where it lies."""
    return payload.note if isinstance(payload, Message) else payload


class Group:
    """Some ranks of the world and how to move bytes between them.

    Args:
        world: the process (rank, counters, fault reporter).
        ranks: global ranks of the members, in the order that decides chunks and sums.
        pg: the process group, or ``None`` when this rank is alone.
        builtin: use the backend's own collectives (NCCL, fake) instead of sends and receives.
    """

    def __init__(self, world: Process, ranks: Sequence[int], pg: dist.ProcessGroup | None, builtin: bool) -> None:
        self.world = world
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(world.rank)
        self.size = len(self.ranks)
        self.pg = pg
        self.builtin = builtin

    # --- waiting ---------------------------------------------------------------------------
    def wait(self, works: Sequence[object], op: Op) -> None:
        tracker = self.world.tracker
        start = perf_counter()
        tracker.waiting = (op, self, start)
        if events.listeners:
            events.wait(op.kind, op.unit)
        try:
            for work in works:
                work.wait()  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise self.world.faults.explain(error, op, self) from error
        finally:
            tracker.waiting = None
            self.world.stats.of(op.kind).wait_s += perf_counter() - start
            if events.listeners:
                events.waited(op.kind, op.unit)

    def closed(self) -> list[int]:
        """Ranks whose connections to this one are closed: gloo refuses to send to them.

        Cost: a message without bytes to each other rank, which it never asks for. None where the backend is another.
        """
        pg, nothing = self.pg, torch.empty(0)
        out = []
        for rank in self.peers() if pg is not None and not self.builtin else ():
            try:
                pg.send([nothing], rank, _TO_NOBODY)  # type: ignore[union-attr]
            except RuntimeError:
                out.append(self.ranks[rank])
        return out

    def allow(self, op: Op) -> None:
        """Raise if some ranks have run out of data and will not come to this collective."""
        if self.world.join is not None:
            self.world.join.allow(op)

    def _count(self, op: Op, nbytes: int) -> None:
        count = self.world.stats.of(op.kind)
        count.calls += 1
        count.bytes_sent += nbytes
        if events.listeners:
            events.start(op.kind, op.unit, nbytes, self.ranks)

    def _issue(self, op: Op, start: Callable[[], list[object]]) -> list[object]:
        try:
            return start()
        except CommError:  # shared memory is full
            raise
        except RuntimeError as error:  # the connection to a rank that ended is found here as often as in wait()
            raise self.world.faults.explain(error, op, self) from error

    def exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], recvs: Sequence[tuple[torch.Tensor, int]], op: Op
    ) -> list[object]:
        """Start tagged sends ``(tensor, group rank)`` and receives; returns their work handles."""
        self._count(op, sum(t.numel() * t.element_size() for t, _ in sends))
        return self._issue(op, lambda: self.start_exchange(sends, recvs, op.tag))

    # --- through shared memory -----------------------------------------------------------------
    def arrival(self, r: int, like: torch.Tensor) -> Message | None:
        """A message of as many elements as these that group rank ``r`` will put into shared memory; ``None``: it sends
        it."""
        memory, rank = self.world.memory, self.ranks[r]
        if memory is None or like.nbytes < SHORTEST or rank not in memory.reads:
            return None
        return Message(memory, rank, like.numel(), like.dtype)

    def all_share(self, nbytes: int) -> bool:
        """Will a message of so many bytes to all other ranks lie in shared memory?"""
        return self.size > 1 and not self.builtin and nbytes >= SHORTEST and self.has_one_memory()

    def has_one_memory(self) -> bool:
        """Does each rank read what each other one puts into shared memory?"""
        memory = self.world.memory
        return memory is not None and memory.is_shared(self.ranks)

    def lay(self, mine: torch.Tensor) -> Message:
        """Put a message to all ranks, this one too, into shared memory."""
        assert self.world.memory is not None
        return self.world.memory.put(mine, self.ranks)

    def swap(
        self, sends: Sequence[tuple[torch.Tensor | Message, int]], recvs: Sequence[tuple[torch.Tensor | Message, int]],
        op: Op,
    ) -> list[object]:  # fmt: skip
        """As :meth:`exchange`, through shared memory where there is some: among ranks of which none can go on before it
        has what the others send.

        Args:
            sends: also what lies there already.
            recvs: what :meth:`arrival` gives is to be read where it lies, and released.
        """
        self._count(op, sum(t.nbytes for t, _ in sends))

        def start() -> list[object]:
            works = self.start_exchange([], [(_announced(into), r) for into, r in recvs], op.tag)
            for sent, r in sends:  # one after the other, so that the first is on its way while the next is copied
                works += self.start_exchange([(_announced(self._laid(sent, r)), r)], [], op.tag)
            return works

        return self._issue(op, start)

    def _laid(self, sent: torch.Tensor | Message, r: int) -> torch.Tensor | Message:
        """Put it into shared memory, if group rank ``r`` reads it there and it is long enough."""
        memory, rank = self.world.memory, self.ranks[r]
        if isinstance(sent, Message) or memory is None or sent.nbytes < SHORTEST or rank not in memory.read_by:
            return sent
        return memory.put(sent, [rank])

    # --- the backend's own -------------------------------------------------------------------
    def start_exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], recvs: Sequence[tuple[torch.Tensor, int]], tag: int
    ) -> list[object]:
        pg = self.pg
        assert pg is not None
        works: list[object] = [pg.recv([t], r, tag) for t, r in recvs]
        works += [pg.send([t], r, tag) for t, r in sends]
        return works

    def start_all_gather(self, flat: torch.Tensor, mine: torch.Tensor) -> object:
        # torch 2.13 renames this and reduce-scatter; 2.11 has the old names only.
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return call(flat, mine, group=self.pg, async_op=True)

    def start_reduce_scatter(self, out: torch.Tensor, raw: torch.Tensor) -> object:
        """The sum."""
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return call(out, raw, group=self.pg, async_op=True)

    def start_all_reduce(self, tensor: torch.Tensor) -> object:
        """The sum, in place."""
        return dist.all_reduce(tensor, group=self.pg, async_op=True)

    def start_broadcast(self, tensor: torch.Tensor, source: int) -> object:
        return dist.broadcast(tensor, group=self.pg, group_src=source, async_op=True)

    def peers(self) -> list[int]:
        """The other group ranks, nearest first, so that not all ranks send to the same one at once."""
        return [(self.rank + k) % self.size for k in range(1, self.size)]

    # --- collectives -----------------------------------------------------------------------
    def all_gather(self, flat: torch.Tensor, op: Op) -> Transfer:
        """Fill ``flat`` ``(size * n,)`` in place: chunk *i* comes from group rank *i*, whose own chunk
        must already lie there. Sends ``(size - 1) * n`` elements per rank."""
        if self.size == 1:
            return Transfer(None, None)
        self.allow(op)
        chunk = flat.numel() // self.size
        mine = flat[self.rank * chunk : (self.rank + 1) * chunk]
        if self.builtin:
            self._count(op, (self.size - 1) * chunk * flat.element_size())
            return Transfer(self, op, self._issue(op, lambda: [self.start_all_gather(flat, mine)]))
        sends = [(mine, r) for r in self.peers()]
        recvs = [(flat[r * chunk : (r + 1) * chunk], r) for r in reversed(self.peers())]
        return Transfer(self, op, self.exchange(sends, recvs, op))

    def all_gather_late(self, mine: torch.Tensor, flat: Callable[[], torch.Tensor], op: Op) -> Transfer:
        """As :meth:`all_gather`, where all share memory: everything lies there until this rank waits for it.

        Args:
            mine: ``(n,)`` this rank's chunk. It is copied.
            flat: gives the ``(size * n,)`` where the chunks go, when they are here.
        """
        self.allow(op)
        peers, own = self.peers(), self.lay(mine)
        arrivals = {r: message for r in reversed(peers) if (message := self.arrival(r, mine))}

        def move() -> None:
            rows = flat().view(self.size, -1)
            for r, message in {self.rank: own, **arrivals}.items():
                message.move(rows[r])

        works = self.swap([(own, r) for r in peers], [(message, r) for r, message in arrivals.items()], op)
        return Transfer(self, op, works, move)

    def broadcast(self, tensor: torch.Tensor, op: Op, source: int = 0) -> Transfer:
        """Group rank ``source``'s values to everyone, in place."""
        if self.size == 1 or tensor.numel() == 0:
            return Transfer(None, None)
        self.allow(op)
        if self.builtin:
            self._count(op, tensor.numel() * tensor.element_size() if self.rank == source else 0)
            return Transfer(self, op, [self.start_broadcast(tensor, source)])
        if self.rank == source:
            return Transfer(self, op, self.exchange([(tensor, r) for r in self.peers()], [], op))
        return Transfer(self, op, self.exchange([], [(tensor, source)], op))
