"""Several small transfers as one message.

A message costs 0.1 to 0.3 ms over gloo however short it is, so what is short travels together: packed into one buffer,
shard by shard, and put in its places on arrival. Every element is sent to the same rank as alone, and summed in the
same order, so neither bytes nor bits change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shardwise.comm.group import Transfer
from shardwise.comm.mesh import Mesh
from shardwise.comm.reduction import Memory, Reduction
from shardwise.comm.stats import Op

JOINED_BYTES = 1 << 20
"""What travels together: up to this many bytes of flat buffers, whatever the number of ranks. Longer ones travel alone,
and are not copied."""


class JoinedReduction:
    """As :class:`~shardwise.comm.reduction.Reduction`, of several flat buffers of one dtype.

    When it is made, everything has been copied: whoever gave it may let it go, and then :meth:`start` it.

    Args:
        packed: what is sent: shard by shard, and in each of them ``n`` elements of each buffer, with an ``n`` of
            its own.
        free: called when it is not needed any more.
    """

    __slots__ = ("_free", "_memory", "_outs", "_packed", "_reduction", "_summed", "_total", "mesh", "op")

    def __init__(self, mesh: Mesh, packed: torch.Tensor, op: Op, memory: Memory, free: Callable[[], None]) -> None:
        self.mesh, self.op, self._memory, self._free = mesh, op, memory, free
        self._packed: torch.Tensor | None = packed
        self._summed: torch.Tensor | None = None  # memory for sums in another dtype
        self._reduction: Reduction | None = None

    def start(self, outs: Sequence[torch.Tensor]) -> None:
        """Send what was copied.

        Args:
            outs: ``(copies, n)`` each: the held shards. All have one dtype.
        """
        packed, copies, dtype = self._packed, len(self.mesh.held), outs[0].dtype
        assert packed is not None
        n = packed.numel() // self.mesh.parts
        total: torch.Tensor = packed[self.mesh.held.start * n : self.mesh.held.stop * n]
        if dtype != packed.dtype:
            total = self._summed = self._memory.empty(copies * n, dtype, packed.device, "gather_buffers")
        self._total, self._outs = total.view(copies, n), list(outs)
        self._reduction = self.mesh.reduce(packed, total, self.op, self._memory)

    def advance(self) -> None:
        """Finish the first stage and start the second."""
        if self._reduction is not None:
            self._reduction.advance()

    def wait(self) -> None:
        """Finish both, and put what was reduced in its places. May be called any number of times."""
        if self._reduction is None:
            return
        self._reduction.wait()
        self._reduction = None
        with torch.no_grad():
            torch._foreach_copy_(self._outs, self._total.split([out.shape[1] for out in self._outs], dim=1))
        if self._summed is not None:
            self._memory.drop(self._summed, "gather_buffers")
        del self._outs, self._total, self._summed
        self._packed = None
        self._free()


def gather_joined(
    mesh: Mesh,
    shards: Sequence[torch.Tensor],
    flats: Callable[[], Sequence[torch.Tensor]],
    op: Op,
    memory: Memory,
    *,
    own: bool,
) -> Transfer:
    """As :meth:`~shardwise.comm.mesh.Mesh.gather`, of several flat buffers of one dtype.

    Args:
        shards: ``(copies * n,)`` each: the held shards, with an ``n`` of its own. They are copied at once.
        flats: gives the ``(parts * n,)`` where the values go, when they are here.
        own: this rank's go there, too. Otherwise they are there.
    """
    size, rank = mesh.shard.size, mesh.shard.rank
    widths = [shard.numel() for shard in shards]
    n = sum(widths)
    packed = memory.empty(size * n, shards[0].dtype, shards[0].device, "gather_buffers")
    torch.cat(list(shards), out=packed[rank * n : (rank + 1) * n])

    def put() -> None:
        places = [flat.view(size, -1) for flat in flats()]
        found = packed.view(size, n).split(widths, dim=1)
        with torch.no_grad():
            for lo, hi in [(0, size)] if own else [(0, rank), (rank + 1, size)]:
                if lo < hi:
                    torch._foreach_copy_([place[lo:hi] for place in places], [part[lo:hi] for part in found])
        memory.drop(packed, "gather_buffers")

    transfer = mesh.gather(packed, op)
    transfer.after = put
    return transfer
