"""The home of offloaded state on one rank: host memory, or a disk and a fixed number of host buffers before it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from shardwise.tiers.aligned import ALIGN, BufferPool, padded
from shardwise.tiers.disk import DiskStats, DiskStore, Extent
from shardwise.tiers.ledger import Ledger
from shardwise.tiers.link import Link
from shardwise.tiers.staged import Place, bring, send_away
from shardwise.tiers.transfer import Transfer

SLOT = 64
"""Bytes. Tensors in a buffer begin at multiples of it, as torch's own allocator places them."""


class Loan(NamedTuple):
    """A buffer, and the pool to give it back to (which may have been replaced by a larger one)."""

    pool: BufferPool
    buffer: torch.Tensor

    def release(self, after: Sequence[Transfer] = ()) -> None:
        self.pool.release(self.buffer, All(after) if after else None)


class All:
    """Several transfers as one."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self.transfers = transfers

    def wait(self) -> None:
        for transfer in self.transfers:
            transfer.wait()


class Home:
    """Where offloaded state lives between two uses.

    Args:
        kind: ``cpu`` or ``nvme``.
        ledger: counts the buffers, under ``offload_buffers``.
        path: an existing folder on the disk; ``None`` finds one.
        rank: for names and reports.
        buffers: host buffers before the disk, each as large as the largest part that goes through.
        depth: requests to the disk in flight, of reads and of writes each.
        pin: page-lock the buffers, for copies to and from a CUDA device.
        ratio: the part of the bytes that goes to the disk; to within 4 KiB of all there are.
        device: where the model computes; ``None`` for the CPU.
        separate: its memory is not the host's, so that master values and gradients have to be copied.
        warn: say so if the disk cannot do direct I/O.

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
        ratio: float = 1.0,
        device: torch.device | None = None,
        separate: bool | None = None,
        warn: bool = True,
    ) -> None:
        self.kind, self.ledger, self.buffers, self.pin, self.ratio = kind, ledger, buffers, pin, ratio
        self.disk = DiskStore(path, rank=rank, depth=depth, warn=warn) if kind == "nvme" else None
        self.link = Link(device or torch.device("cpu"))
        self.separate = self.link.device.type != "cpu" if separate is None else separate
        self._pool: BufferPool | None = None
        self._dropped: list[Extent] = []
        self._total = self._placed = 0  # bytes of all shelves, and of them on the disk

    @property
    def store(self) -> DiskStore:
        assert self.disk is not None, "only a disk has a store"
        return self.disk

    @property
    def stats(self) -> DiskStats:
        return self.disk.stats if self.disk is not None else DiskStats()

    def reset_stats(self) -> None:
        """Count from zero, once what is under way has ended."""
        if self.disk is not None:
            self.disk.drain()
            self.disk.reset_stats()
        self.link.to_host_bytes = self.link.to_device_bytes = 0

    # --- buffers -----------------------------------------------------------------------------
    def lend(self, nbytes: int) -> Loan:
        """A buffer of at least ``nbytes``. All are replaced if they are too short, which ends with the first step."""
        if self._pool is None or self._pool.buffer_bytes < nbytes:
            if self._pool is not None:
                if self.disk is not None:
                    self.disk.drain()
                self.count(-self._pool.nbytes)
            self._pool = BufferPool(self.buffers, nbytes, pin=self.pin)
            self.count(self._pool.nbytes)
        return Loan(self._pool, self._pool.acquire())

    def count(self, nbytes: int) -> None:
        self.ledger.add("offload_buffers", nbytes)

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

    def _gone(self, extent: Extent | None, nbytes: int, kept: int) -> None:
        if extent is not None:
            self._dropped.append(extent)  # not freed here: the collector may be running anywhere
        self._total -= nbytes
        self._placed -= nbytes - kept
        self.ledger.add("optimizer", -kept)


class Shelf:
    """Room for ``nbytes`` at home ``nvme``, given back when it is dropped.

    The first ``home.ratio`` of them are one extent on the disk; the rest stays in memory and is copied from and to the
    buffers.
    """

    def __init__(self, home: Home, name: str, nbytes: int) -> None:
        self.home, self.name, self.nbytes = home, name, nbytes
        self.placed = home.share(nbytes)
        self.extent = home.extent(name, self.placed) if self.placed else None
        self._rest = torch.empty(nbytes - self.placed, dtype=torch.uint8)
        home.ledger.add("optimizer", self._rest.numel())
        weakref.finalize(self, home._gone, self.extent, nbytes, self._rest.numel()).atexit = False

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


class Values:
    """A flat tensor with a home, and views of it that come and go with it.

    Args:
        home: where it lives. At home ``cpu`` every method is a no-op: it is here always.
        name: for reports.
        tensor: 1-D, on the host; its bytes go to the home at once.
        views: with the element each one begins at; contiguous.
    """

    def __init__(self, home: Home, name: str, tensor: torch.Tensor, views: Sequence[tuple[int, torch.Tensor]]) -> None:
        self.home, self.tensor, self.views, self.name = home, tensor, list(views), name
        self.on_disk = home.disk is not None and tensor.nbytes > 0
        self.nbytes = padded(tensor.nbytes) if self.on_disk else 0
        self._own = tensor.nbytes
        self.here = True
        if self.on_disk:
            self.shelf = Shelf(home, f"{name} values", tensor.nbytes)
            All(self.write(tensor.view(torch.uint8))).wait()
            self.send_away()
        else:
            home.ledger.add("optimizer", tensor.nbytes)

    def read(self, buffer: torch.Tensor) -> list[Transfer]:
        """Start to bring them into the beginning of a buffer."""
        return self.shelf.read(buffer[: self._own])

    def write(self, buffer: torch.Tensor) -> list[Transfer]:
        """Start to write them out from the beginning of a buffer, where :meth:`bring` put them."""
        return self.shelf.write(buffer[: self._own])

    def bring(self, buffer: torch.Tensor) -> None:
        """They have arrived in the beginning of ``buffer``: let tensor and views be there."""
        bring(self.tensor, buffer[: self._own].view(self.tensor.dtype))
        for at, view in self.views:
            bring(view, self.tensor[at : at + view.numel()].view(view.shape))
        self.here = True

    def send_away(self) -> None:
        """Let go of the memory; the bytes are on the disk or on their way there."""
        size = self.tensor.element_size()
        for at, view in self.views:
            if view.numel():
                send_away(view, Place(self.shelf, at * size, self.name))
        send_away(self.tensor, Place(self.shelf, 0, self.name))
        self.here = False

    def materialise(self) -> None:
        """Have them in memory of their own, outside of the buffers, until :meth:`settle`."""
        if not self.here:
            memory = torch.empty(self._own, dtype=torch.uint8)
            All(self.read(memory)).wait()
            self.bring(memory)

    def settle(self) -> None:
        """After :meth:`materialise`: write them out and let go."""
        if self.on_disk and self.here:
            All(self.write(self.tensor.view(torch.uint8))).wait()
            self.send_away()
