"""The mesh of ranks: a *shard* axis that splits the states and a *replicate* axis that repeats them.

Rank ``r`` stands at row ``r // S`` (replicate) and column ``r % S`` (shard). Every flat buffer has one
shard per rank of the world; column ``s`` *holds* the ``R`` consecutive shards ``s*R .. (s+1)*R``.
``ddp`` is S = 1 (everyone holds everything), ZeRO is R = 1, ``hsdp`` is the mixture: one code path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shardwise.comm.group import Group, Transfer
from shardwise.comm.process import Process
from shardwise.comm.reduction import Axes, Memory, Reduction
from shardwise.comm.stats import Op

_COPIES = 1 << 24  # tags of copied models begin here


class Mesh:
    """Shard and replicate groups of this rank.

    Args:
        world: the process.
        whole, shard, replicate: the groups this rank belongs to.
    """

    def __init__(self, world: Process, whole: Group, shard: Group, replicate: Group, control: Group) -> None:
        self.world, self.whole, self.shard, self.replicate, self.control = world, whole, shard, replicate, control
        self.parts = whole.size
        self.first_held = shard.rank * replicate.size
        self._tags = self._copy_tags = 0
        # Which shard each rank reduces: column s, row r takes shard s*R + r, so that the R shards of a
        # column end up in row order, ready to be gathered along the replicate axis.
        order = [(r % shard.size) * replicate.size + r // shard.size for r in range(whole.size)]
        self._axes = Axes(whole, shard, replicate, order)

    def new_tag(self) -> int:
        """A tag that no other unit of this mesh uses; equal on all ranks that shard in the same order."""
        self._tags += 1
        return self._tags

    def skip_tags(self, count: int) -> None:
        """Be as if so many units had been made, on a rank that could not make them."""
        self._tags += count

    @property
    def tags(self) -> int:
        """How many tags there are."""
        return self._tags

    def new_copy_tag(self) -> CopyTag:
        """As :meth:`new_tag`, for a copy: it is taken when it is needed."""
        return CopyTag(self)

    def next_copy_tag(self) -> int:
        """A tag from a range of its own, that no other copy of this mesh uses."""
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
        return Reduction(self._axes, raw, out, op, memory)


class CopyTag:
    """The tag of a copied unit or model: the next one, when its first message is sent.

    All ranks send that message, so they agree. When copies are made they need not: one rank may have copied a model for
    itself.
    """

    __slots__ = ("_mesh", "_tag")

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._tag = mesh, 0

    def __call__(self) -> int:
        self._tag = self._tag or self._mesh.next_copy_tag()
        return self._tag


def build_mesh(world: Process, shard_size: int, make_group: Callable[[list[list[int]]], Group], control: Group) -> Mesh:
    """Groups for a world cut into columns of ``shard_size`` ranks. Collective: every rank calls it."""
    size, cut = world.size, shard_size
    rows = [list(range(r * cut, (r + 1) * cut)) for r in range(size // cut)]
    columns = [list(range(c, size, cut)) for c in range(cut)]
    everyone = list(range(size))
    whole = make_group([everyone])
    shard = whole if cut == size else make_group(rows)
    replicate = whole if cut == 1 else make_group(columns)
    return Mesh(world, whole, shard, replicate, control)
