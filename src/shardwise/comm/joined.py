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

    When it is made, ``raws`` have been copied: whoever gave them may let them go, and then :meth:`start` it.

    Args:
        raws: ``(parts * n,)`` each, with an ``n`` of its own.
        outs: ``(copies * n,)`` each: the held shards. All have one dtype.
    """

    __slots__ = ("_memory", "_outs", "_packed", "_reduction", "_total", "mesh", "op")

    def __init__(
        self, mesh: Mesh, raws: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], op: Op, memory: Memory
    ) -> None:
        parts, copies = mesh.parts, len(mesh.held)
        first, self._memory, self.mesh, self.op = raws[0], memory, mesh, op
        n = sum(raw.numel() for raw in raws) // parts
        packed = memory.empty(parts * n, first.dtype, first.device, "gather_buffers")
        torch.cat([raw.view(parts, -1) for raw in raws], dim=1, out=packed.view(parts, n))
        total: torch.Tensor = packed[mesh.held.start * n : mesh.held.stop * n]
        self._packed = [packed]
        if outs[0].dtype != first.dtype:
            total = memory.empty(copies * n, outs[0].dtype, first.device, "gather_buffers")
            self._packed.append(total)
        self._total = total.view(copies, n)
        self._outs = [out.view(copies, -1) for out in outs]
        self._reduction: Reduction | None = None

    def start(self) -> None:
        """Send what was copied."""
        self._reduction = self.mesh.reduce(self._packed[0], self._total.view(-1), self.op, self._memory)

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
        for tensor in self._packed:
            self._memory.drop(tensor, "gather_buffers")
        del self._outs, self._total, self._packed


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
