"""The home of offloaded state on one rank: host memory, or a disk and a fixed number of host buffers before it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple, Protocol

import torch

from shardwise.tiers.aligned import ALIGN, BufferPool
from shardwise.tiers.disk import DiskStats, DiskStore, Extent
from shardwise.tiers.ledger import Ledger
from shardwise.tiers.link import Link
from shardwise.tiers.malloc import release_free_memory
from shardwise.tiers.planned_disk import PlannedDisk
from shardwise.tiers.stored_files import StoredFiles
from shardwise.tiers.transfer import Transfer, TransferGroup

TENSOR_ALIGN = 64
"""Bytes. Tensors in a buffer begin at multiples of it, as torch's own allocator places them."""


class BufferLease(NamedTuple):
    """A buffer, and the pool to give it back to (which may have been replaced by a larger one)."""

    pool: BufferPool
    buffer: torch.Tensor

    def release(self, after: Sequence[Transfer] = ()) -> None:
        self.pool.release(self.buffer, TransferGroup(after) if after else None)


class Prefetch(Protocol):
    """Values that are being read ahead, through a buffer that is free once they were sent on."""

    def send(self) -> object: ...


class Home:
    """Where offloaded state lives between two uses.

    Args:
        kind: ``cpu`` or ``nvme``.
        ledger: counts the buffers, under ``offload_buffers``.
        path: an existing folder on the disk; ``None`` finds one.
        rank: for names and reports.
        buffers: host buffers before the disk, each as large as the largest part that goes through.
        depth: requests to the disk in flight, of reads and of writes each.
        pin: page-lock the buffers, for copies to and from a device.
        ratio: the part of the bytes that goes to the disk; to within 4 KiB of all there are.
        device: where the model computes; ``None`` for the CPU.
        ahead: values that are read ahead from the disk to a device with memory of its own, in a buffer each.
        separate: its memory is not the host's, so that master values and gradients have to be copied.
        warn: say so if the disk cannot do direct I/O.
        planned: nothing is written, only counted: tensors have no values.

    Attributes:
        disk: the store of extents; ``None`` at home ``cpu``.
        link: copies of values and gradients between the device and the host.
        step_link: copies of updates, which values on their way do not wait for.
        prefetches: values that are being read ahead, the first to be needed in front.
        reader: of files that somebody else wrote, where values are read from those.
        landing: waits for gradients that are on their way to the host, in order.

    Raises:
        OffloadError: see :class:`~shardwise.tiers.disk.DiskStore`.
    """

    def __init__(
        self,
        kind: str,
        ledger: Ledger,
        *,
        path: str | None = None,
        rank: int = 0,
        buffers: int = 3,
        depth: int = 4,
        pin: bool = False,
        checksum: bool = False,
        ratio: float = 1.0,
        device: torch.device | None = None,
        ahead: int = 2,
        separate: bool | None = None,
        warn: bool = True,
        planned: bool = False,
    ) -> None:
        self.kind, self.ledger, self.buffers, self.pin, self.ratio = kind, ledger, buffers, pin, ratio
        self.disk: DiskStore | PlannedDisk | None = None
        if kind == "nvme":
            store = partial(DiskStore, path, rank=rank, depth=depth, checksum=checksum, warn=warn)
            self.disk = PlannedDisk() if planned else store()
        self.link = Link(device or torch.device("cpu"))
        self.step_link = Link(self.link.device)
        self.separate = self.link.device.type != "cpu" if separate is None else separate
        self.ahead = ahead
        self.prefetches: deque[Prefetch] = deque()
        self.landing: deque[Callable[[], None]] = deque()
        self.reader: StoredFiles | None = None
        self._trimmed = 0.0
        self._pools: dict[str, BufferPool] = {}
        self._dropped: list[Extent] = []
        self._total = self._placed = 0  # bytes of all extents, and of them on the disk
        self._asked = self._taken = 0  # bytes of units, and of those whose state comes here

    @property
    def store(self) -> DiskStore | PlannedDisk:
        assert self.disk is not None, "only a disk has a store"
        return self.disk

    @property
    def stats(self) -> DiskStats:
        if self.reader is not None:
            return self.reader.stats
        return self.disk.stats if self.disk is not None else DiskStats()

    def reset_stats(self) -> None:
        """Count from zero, once what is under way has ended."""
        if self.reader is not None:
            self.reader.reset_stats()
        if self.disk is not None:
            self.disk.drain()
            self.disk.reset_stats()
        for link in (self.link, self.step_link):
            link.to_host_bytes = link.to_device_bytes = 0

    # --- buffers -----------------------------------------------------------------------------
    def lease(self, nbytes: int, purpose: str = "step", count: int = 0) -> BufferLease:
        """A buffer of at least ``nbytes``. All are replaced if they are too short, which ends with the first step.

        Args:
            purpose: what has buffers of its own, so that none waits for another.
            count: how many there are for it; default: ``buffers``.
        """
        pool = self._pools.get(purpose)
        if pool is None or pool.buffer_bytes < nbytes:
            if pool is not None:
                if self.disk is not None:
                    self.disk.drain()
                self.count(-pool.nbytes)
            with self.ledger.counted():
                pool = self._pools[purpose] = BufferPool(count or self.buffers, nbytes, pin=self.pin)
            self.count(pool.nbytes)
        return BufferLease(pool, pool.acquire())

    def trim(self, *, now: bool = False) -> None:
        """Give freed host memory back to the system, where a disk is used to need less of it. Once a second at most.

        Args:
            now: also if that was less than a second ago.
        """
        if self.disk is not None and (now or perf_counter() - self._trimmed > 1.0):
            release_free_memory()
            self._trimmed = perf_counter()

    def count(self, nbytes: int) -> None:
        self.ledger.add("offload_buffers", nbytes, host=True)

    def takes(self, nbytes: int) -> bool:
        """Does a unit's state of a size that goes with ``nbytes`` belong to the ``ratio`` that comes here?"""
        self._asked += nbytes
        taken = self.ratio * self._asked - self._taken >= nbytes / 2
        self._taken += nbytes * taken
        return taken

    def share(self, nbytes: int) -> int:
        """How many of ``nbytes`` more bytes go to the disk, so that all that do are ``ratio`` of all there are."""
        self._total += nbytes
        wanted = self.ratio * self._total - self._placed
        placed = nbytes if self.ratio == 1 else min(max(round(wanted / ALIGN) * ALIGN, 0), nbytes)
        self._placed += placed
        return placed

    def extent(self, name: str, nbytes: int) -> Extent:
        """Space on the disk; what was dropped meanwhile is given back first."""
        while self._dropped:
            self.store.free(self._dropped.pop())
        return self.store.extent(name, nbytes)

    def _gone(self, extent: Extent | None, total: int, placed: int, kept: int) -> None:
        if extent is not None:
            self._dropped.append(extent)  # not freed here: the collector may be running anywhere
        self._total -= total
        self._placed -= placed
        self.ledger.add("optimizer", -kept, host=True)


class StateExtent:
    """Room for ``nbytes`` at home ``nvme``, given back when it is dropped.

    The first ``home.ratio`` of them are one extent on the disk; the rest stays in memory and is copied from and to the
    buffers. Of parameters (``whole``) all are on the disk.
    """

    def __init__(self, home: Home, name: str, nbytes: int, *, whole: bool = False) -> None:
        self.home, self.name, self.nbytes = home, name, nbytes
        self.placed = nbytes if whole else home.share(nbytes)
        self.extent = home.extent(name, self.placed) if self.placed else None
        self._rest = torch.empty(nbytes - self.placed, dtype=torch.uint8)
        home.ledger.add("optimizer", self._rest.numel(), host=True)
        shared = (0, 0) if whole else (nbytes, self.placed)
        weakref.finalize(self, home._gone, self.extent, *shared, self._rest.numel()).atexit = False

    def read(self, into: torch.Tensor, offset: int = 0) -> list[Transfer]:
        """Start to fill ``into`` (contiguous, ``uint8``) with the bytes at ``offset``."""
        stop = offset + into.numel()
        cut = min(max(self.placed - offset, 0), into.numel())
        if cut < into.numel():
            into[cut:].copy_(self._rest[offset + cut - self.placed : stop - self.placed])
        return [self.home.store.read(self.extent, into[:cut], offset)] if self.extent is not None and cut else []

    def write(self, values: torch.Tensor) -> list[Transfer]:
        """Start to put all bytes (contiguous, ``uint8``) in their place."""
        self._rest.copy_(values[self.placed :])
        return [self.home.store.write(self.extent, values[: self.placed])] if self.extent is not None else []
