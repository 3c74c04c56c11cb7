"""This process as groups and meshes see it: rank, device, counters, the fault reporter, and who is out of data."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shardwise.comm.faults import Faults, Tracker
from shardwise.comm.shared_memory import SharedMemory
from shardwise.comm.stats import CommStats, Op


class JoinContext(Protocol):
    """An open ``join_uneven_inputs`` block, as everything that runs inside of it sees it. ``engine.join.Join`` is one.

    Attributes:
        live: the ranks that have data, ascending.
        leader: the lowest of them.
    """

    live: list[int]
    leader: int

    @property
    def has_followers(self) -> bool:
        """Has the data of some rank ended?"""

    def allow(self, op: Op) -> None:
        """Raise if ranks without data would not come to a collective."""

    def ready(self) -> None:
        """All ranks with data meet before something that those without have no part in."""

    def forward(self, part: int = 0) -> None:
        """A root's forward begins."""

    def event(self, kind: Hashable, engine: Any = None, *args: Any) -> AbstractContextManager[None]:
        """Something that followers have to do as well: tell them, and nothing of what it consists of."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""

    def told_already(self) -> AbstractContextManager[None]:
        """Followers know of what happens inside."""

    def settings(self) -> dict[int, Any]:
        """Hyperparameters that followers have to have, by optimizer."""

    def take_settings(self, settings: dict[int, Any]) -> None:
        """Give the optimizers the :meth:`settings` of another rank."""

    def addresses(self, params: Sequence[Any]) -> Callable[[], Any]:
        """How followers find parameters."""

    def include(self, engines: Sequence[Any]) -> None:
        """Models of a block inside this one take part, too."""

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of each rank that has data."""

    def total(self, value: float) -> float:
        """The sum over ranks that have data."""


class Process:
    """Facts about this process, in the process group that is there now.

    Attributes:
        default_pg: torch's default process group; ``None`` where this rank is alone.
        rank, size, local_size: of this rank; of all; of those on this host.
        device: where models go by default.
        stats: counts of what crossed the wire.
        tracker: what this rank is doing, for reports.
        faults: tells the others, and hears from them, why a rank ends.
        memory: what ranks of this host share; ``None`` until there is a group, and where there is nothing to share.
        fake: collectives do nothing (torch's ``fake`` backend), to plan with.
        join: the open ``join_uneven_inputs`` block.
        saver: what asynchronous saves keep. Nobody here looks at it.
    """

    def __init__(self, device: torch.device) -> None:
        self.default_pg = dist.group.WORLD if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.default_pg else 0
        self.size = dist.get_world_size() if self.default_pg else 1
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size)))
        self.device = device
        self.stats = CommStats()
        self.tracker = Tracker()
        self.fake = self.default_pg is not None and dist.get_backend(self.default_pg) == "fake"
        self.faults = Faults(self.rank, self.size, self.tracker, active=not self.fake)
        self.memory: SharedMemory | None = None
        self.join: JoinContext | None = None
        self.saver: object | None = None
        self._abandoned: list[Any] | None = []

    def keep(self, works: Any) -> None:
        """Hold on to what was started and will not be waited for, until the groups are gone."""
        if self._abandoned is not None:
            self._abandoned.append(works)
