"""A world that there is not: as many ranks as one likes, seen from the first, to plan with.

Whatever asks for the current :class:`~shardwise.comm.World` inside of :func:`planned` gets this one. Messages are
counted and told to listeners, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from shardwise.comm.faults import Faults, Tracker
from shardwise.comm.group import Group
from shardwise.comm.shared_memory import SHORTEST, Message
from shardwise.comm.stats import CommStats
from shardwise.comm.world import World


class _Done:
    """The handle of a message that was not sent."""

    def wait(self) -> None:
        """It has arrived."""


class _Lying(Message):
    """A message in shared memory that nobody put there. It takes no memory of its own: it is what is sent."""

    __slots__ = ("_like",)

    def __init__(self, like: torch.Tensor) -> None:
        self._like, self.numel, self.dtype, self.note = like, like.numel(), like.dtype, like

    @property
    def tensor(self) -> torch.Tensor:
        return self._like

    def release(self) -> None:
        """It has been read."""

    def move(self, into: torch.Tensor) -> None:
        """It is there."""


class PlannedGroup(Group):
    """Ranks that receive and send nothing."""

    def _host(self, r: int) -> int:
        return self.ranks[r] // self.world.local_size

    def arrival(self, r: int, like: torch.Tensor) -> Message | None:
        return _Lying(like) if like.nbytes >= SHORTEST and self._host(r) == self._host(self.rank) else None

    def has_one_memory(self) -> bool:
        return len({self._host(r) for r in range(self.size)}) == 1

    def lay(self, mine: torch.Tensor) -> Message:
        return _Lying(mine)

    def start_exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], recvs: Sequence[tuple[torch.Tensor, int]], tag: int
    ) -> list[object]:
        return [_Done()]

    def start_all_gather(self, flat: torch.Tensor, mine: torch.Tensor) -> object:
        return _Done()

    def start_reduce_scatter(self, out: torch.Tensor, raw: torch.Tensor) -> object:
        return _Done()

    def start_all_reduce(self, tensor: torch.Tensor) -> object:
        return _Done()

    def start_broadcast(self, tensor: torch.Tensor, source: int) -> object:
        return _Done()


class PlannedWorld(World):
    """Rank 0 of ``size`` ranks, ``local_size`` of them on each host."""

    def __init__(self, device: torch.device, size: int, local_size: int) -> None:
        self.default_pg = None
        self.rank, self.size, self.local_size, self.device = 0, size, local_size, device
        self.stats, self.tracker, self.fake = CommStats(), Tracker(), True
        self.faults = Faults(0, size, self.tracker, active=False)
        self.join = self.saver = self.memory = None
        self._abandoned = None
        self._groups, self._meshes = {}, {}

    def _make(self, partition: list[list[int]], device: torch.device, timeout: float) -> Group:
        mine = next(ranks for ranks in partition if self.rank in ranks)
        # On a CPU the sums are ours, and their operations and memory belong to the plan.
        return PlannedGroup(self, mine, None, builtin=device.type != "cpu")


@contextmanager
def planned(device: torch.device, size: int, local_size: int) -> Iterator[PlannedWorld]:
    """A block in which the current world has ``size`` ranks, with ``device`` for each."""
    before = World._planned
    world = PlannedWorld(device, size, local_size)
    World._planned = world
    try:
        yield world
    finally:
        World._planned = before
