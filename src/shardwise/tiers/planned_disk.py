"""A disk that only counts, for a plan: nothing is written, and nothing can be read from it."""

from __future__ import annotations

import itertools

import torch

from shardwise import events
from shardwise.tiers.aligned import padded
from shardwise.tiers.block_io import Extent, Kind
from shardwise.tiers.io_queue import DiskStats


class PlannedTransfer:
    """A request to a disk that there is not; a :class:`shardwise.tiers.transfer.Transfer`.

    Args:
        kind: ``read`` or ``write``.
        name: how listeners know it.
        nbytes: what would cross.
    """

    def __init__(self, kind: Kind, name: str, nbytes: int) -> None:
        self.kind, self.name = kind, name
        self._waited = nbytes == 0
        if not self._waited:
            events.start(kind, name, nbytes)

    @property
    def done(self) -> bool:
        return self._waited

    def wait(self) -> None:
        if not self._waited:
            self._waited = True
            events.wait(self.kind, self.name)
            events.waited(self.kind, self.name)


class PlannedDisk:
    """In the place of a :class:`~shardwise.tiers.disk.DiskStore`: extents have lengths and no bytes.

    Attributes:
        nbytes: that all extents would take on the disk.
        stats: of what was asked for; no time passes.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.stats = DiskStats()
        self._numbers = itertools.count()

    def extent(self, name: str, nbytes: int) -> Extent:
        """Room for ``nbytes``, without any."""
        self.nbytes += padded(nbytes)
        return Extent(name, nbytes, padded(nbytes), f"planned-{next(self._numbers)}", -1)

    def free(self, extent: Extent) -> None:
        self.nbytes -= extent.padded

    def write(self, extent: Extent, tensor: torch.Tensor, offset: int = 0) -> PlannedTransfer:
        self.stats.writes, self.stats.bytes_written = self.stats.writes + 1, self.stats.bytes_written + tensor.nbytes
        return self._transfer("write", extent, tensor)

    def read(self, extent: Extent, tensor: torch.Tensor, offset: int = 0) -> PlannedTransfer:
        self.stats.reads, self.stats.bytes_read = self.stats.reads + 1, self.stats.bytes_read + tensor.nbytes
        return self._transfer("read", extent, tensor)

    def _transfer(self, kind: Kind, extent: Extent, tensor: torch.Tensor) -> PlannedTransfer:
        return PlannedTransfer(kind, f"{extent.name} {next(self._numbers)}", tensor.nbytes)

    def reset_stats(self) -> None:
        self.stats = DiskStats()

    def drain(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """There is nothing to give back."""
