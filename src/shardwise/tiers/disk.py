"""The disk tier: extents of bytes in a private swap folder, written and read in the background.

::

    store = DiskStore("/mnt/nvme", rank=rank)
    total = padded(values.nbytes) + padded(exp_avg.nbytes) + padded(exp_avg_sq.nbytes)
    extent = store.extent("blocks.3", total)
    store.write(extent, buffer[:total]).wait()
    coming = store.read(extent, buffer[:total])   # other work
    coming.wait()
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import math
import os
import warnings
import weakref

import numpy as np
import torch

from shardwise.errors import OffloadError
from shardwise.sizes import format_bytes
from shardwise.tiers.aligned import ALIGN, aligned_empty, padded
from shardwise.tiers.block_io import BlockIO, Bytes, Extent
from shardwise.tiers.direct_io import DIRECT, UNSUPPORTED
from shardwise.tiers.disk_errors import again, explain, free_bytes
from shardwise.tiers.io_queue import DiskStats, DiskTransfer, IOQueue
from shardwise.tiers.mounts import file_system, in_memory
from shardwise.tiers.swap import SwapFolder

__all__ = ["CHUNK", "DEPTH", "DiskStats", "DiskStore", "DiskTransfer", "Extent", "memory_of"]

CHUNK = 4 << 20
DEPTH = 4
CLOSE_S = 10.0


class DiskStore:
    """One rank's bytes on a disk.

    Args:
        folder: an existing folder on the disk (``nvme_path``); default: see ``swap.default_folder``.
        rank: for names and reports.
        chunk: bytes of one request to the disk; a multiple of 4096.
        depth: requests in flight, of reads and of writes each.
        checksum: check every read against a CRC-32 per chunk, kept in memory (4 bytes per chunk). Transfers that
            cover a chunk in part then cost a whole one.
        direct: bypass the page cache (``O_DIRECT``). Where a file system cannot, I/O is buffered, with one warning,
            and the cache is emptied behind each transfer, so that memory stays bounded all the same.
        timeout: seconds without any progress after which a wait ends in an error.
        warn: say so if I/O is buffered; for all but one rank of a host, ``False``.

    Attributes:
        direct: whether the page cache is bypassed.
        folder: the :class:`~shardwise.tiers.swap.SwapFolder`.
        stats: a :class:`DiskStats`.

    After an error the store refuses all further work with that same error. Files are never left behind: they have no
    name, and the folder goes with the process.

    Raises:
        OffloadError: the folder is missing, not writable or full, or an argument has no meaning.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        rank: int = 0,
        chunk: int = CHUNK,
        depth: int = DEPTH,
        checksum: bool = False,
        direct: bool = True,
        timeout: float = 300.0,
        warn: bool = True,
    ) -> None:
        if chunk < ALIGN or chunk % ALIGN:
            raise OffloadError(f"chunk={chunk} is not a positive multiple of {ALIGN}", fix=f"chunk={CHUNK}")
        if depth < 1:
            raise OffloadError(f"depth={depth}: no request could be in flight", fix=f"depth={DEPTH}")
        if not (timeout > 0 and math.isfinite(timeout)):
            raise OffloadError(f"timeout={timeout} is not a positive number of seconds", fix="timeout=300")
        self.rank, self.chunk, self.depth, self.checksum = rank, chunk, depth, checksum
        self.folder = SwapFolder(folder, rank=rank)
        self._where = f"rank {rank}"
        self._extents: set[Extent] = set()
        self._numbers = itertools.count()
        try:
            reason = self._why_not_direct() if direct else ""
        except OSError as error:
            self.folder.close()
            if isinstance(error, OffloadError):
                raise
            raise explain(error, "trying the disk", f"rank {rank}", self.folder.base) from error
        self.direct = direct and not reason
        if reason and warn:
            warnings.warn(
                f"nvme_path {self.folder.base}: {reason}; the swap files go through the page cache instead",
                stacklevel=2,
            )
        io = BlockIO(self._where, self.folder.path, chunk=chunk, direct=self.direct, checksum=checksum)
        self._queue = IOQueue(io, depth, timeout)
        self._finalizer = weakref.finalize(self, _close, self._queue, self.folder)

    @property
    def stats(self) -> DiskStats:
        return self._queue.stats

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return sum(extent.padded for extent in self._extents)

    def reset_stats(self) -> None:
        """Count from zero; wait for what is under way first."""
        self._queue.stats = DiskStats()

    # --- extents -----------------------------------------------------------------------------
    def extent(self, name: str, nbytes: int) -> Extent:
        """Reserve ``nbytes`` bytes in one run; they read as zeros.

        The space is taken now, so a disk that is too small is found here and not in the middle of training.

        Args:
            name: for reports; as a rule the unit's.

        Raises:
            OffloadError: they do not fit, or the store is closed or has failed.
        """
        self._check()
        if nbytes < 0:
            raise OffloadError(f"an extent of {nbytes} bytes", where=self._where, fix="give its length in bytes")
        where = f"{self._where}, extent {name!r} in {self.folder.base}"
        path = os.path.join(self.folder.path, f"extent-{next(self._numbers)}.swap")
        try:
            fd = _open(path, self.direct)
        except OSError as error:
            raise explain(error, "making a file", where, self.folder.base, nbytes) from error
        try:
            _reserve(fd, padded(nbytes), self.folder.base)
        except OSError as error:
            os.close(fd)
            doing = f"reserving {format_bytes(nbytes)}, with {format_bytes(self.nbytes)} reserved by this rank before"
            raise explain(error, doing, where, self.folder.base, nbytes) from error
        extent = Extent(name, nbytes, padded(nbytes), path, fd)
        self._extents.add(extent)
        self._queue.files.add(fd)
        return extent

    def free(self, extent: Extent) -> None:
        """Give an extent's space back; waits for what is under way on it.

        Raises:
            OffloadError: such a transfer failed, or the extent is not (any more) of this store.
        """
        self._own(extent)
        self._queue.drain(extent)
        self._extents.discard(extent)
        self._queue.files.discard(extent.fd)
        os.close(extent.fd)

    # --- transfers ---------------------------------------------------------------------------
    def write(self, extent: Extent, tensor: torch.Tensor, offset: int = 0) -> DiskTransfer:
        """Start to write a tensor's bytes at ``offset`` bytes of an extent.

        Args:
            tensor: contiguous, on the CPU, any shape and dtype; must stay as it is until the transfer has ended.

        Returns:
            The transfer. Transfers on the same bytes take place in the order in which they were started.

        Raises:
            OffloadError: it does not fit into the extent, or is not contiguous or not on the CPU, or the store has
                failed before.

        Cost: nothing is copied if the tensor's address, its length and ``offset`` are multiples of 4096 (of ``chunk``,
        lengths and offsets, with ``checksum``); otherwise the first and last chunk, or all, go through a scratch.
        """
        return self._queue.submit("write", extent, offset, self._bytes(extent, tensor, offset))

    def read(self, extent: Extent, tensor: torch.Tensor, offset: int = 0) -> DiskTransfer:
        """Start to fill a tensor with the bytes at ``offset`` of an extent; see :meth:`write`.

        Autograd is not told that the values change.
        """
        return self._queue.submit("read", extent, offset, self._bytes(extent, tensor, offset))

    def _bytes(self, extent: Extent, tensor: torch.Tensor, offset: int) -> Bytes:
        self._own(extent)
        where = self._queue.io.place(extent)
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            kind = f"on {tensor.device}" if tensor.device.type != "cpu" else "not contiguous"
            raise OffloadError(f"a tensor that is {kind}", where=where, fix="copy it to a host buffer first")
        if offset < 0 or offset + tensor.nbytes > extent.nbytes:
            raise OffloadError(
                f"{tensor.nbytes} bytes at {offset} are not inside its {extent.nbytes} bytes",
                where=where,
                fix="reserve a longer extent",
            )
        if tensor.nbytes == 0:
            return np.empty(0, np.uint8)
        return memory_of(tensor)

    # --- the end -----------------------------------------------------------------------------
    def drain(self) -> None:
        """Wait for everything under way.

        Raises:
            OffloadError: the first failure, if there was any.
        """
        for extent in list(self._extents):
            self._queue.drain(extent)
        self._check()

    def close(self) -> None:
        """Drop what has not begun, give all space back and remove the folder. Also done when the store is no longer
        referenced, and when Python exits."""
        self._finalizer()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        with self._queue.lock:
            if self._queue.error is not None:
                raise again(self._queue.error)

    def _own(self, extent: Extent) -> None:
        self._check()
        if extent not in self._extents:
            raise OffloadError("the extent was freed, or is another store's", where=repr(extent), fix="reserve another")

    def _why_not_direct(self) -> str:
        """Why this disk has to be used through the page cache; empty if it has not."""
        base = self.folder.base
        if in_memory(base):
            return f"this folder lies in memory ({file_system(base)}), not on a disk"
        if not DIRECT:
            return "this system has no direct I/O"
        if free_bytes(base) < ALIGN:
            raise OffloadError("the disk is full", where=f"{self._where}, {base}", fix="free space there")
        try:
            fd = _open(os.path.join(self.folder.path, f"extent-{next(self._numbers)}.swap"), True)
            try:
                block = aligned_empty(ALIGN).numpy()
                os.pwrite(fd, block.data, 0)
                os.preadv(fd, [block.data], 0)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return f"its file system ({file_system(base) or 'unknown'}) refuses direct I/O"
            raise
        return ""


def memory_of(tensor: torch.Tensor) -> Bytes:
    """The bytes of a contiguous tensor on the CPU, which lives as long as the array."""
    # Not tensor.numpy(): it would never let the tensor's storage be resized again.
    memory = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]
    return np.ctypeslib.as_array(memory)


def _open(path: str, direct: bool) -> int:
    """A new file without a name: its bytes are free as soon as nobody has it open, whatever ends the process."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (DIRECT if direct else 0)
    try:
        fd = os.open(path, flags, 0o600)
    finally:
        if os.path.lexists(path):
            os.unlink(path)
    return fd


def _reserve(fd: int, nbytes: int, folder: str) -> None:
    if free_bytes(folder) < nbytes:  # asked first: taking what there is, to fail then, would stop others on this disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate") and nbytes:
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as error:  # no reservation on this file system: what is free now has to do
            if error.errno not in UNSUPPORTED:
                raise
    os.ftruncate(fd, nbytes)


def _close(requests: IOQueue, folder: SwapFolder) -> None:
    if os.getpid() != requests.pid:  # a forked child has the files, but not the threads
        return
    requests.stop(OffloadError("the store is closed", where=requests.io.where, fix="make a new one"), CLOSE_S)
    folder.close()
