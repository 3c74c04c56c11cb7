"""Files that somebody else wrote, read in the background and past the page cache, in place.

The threads and the order of requests are those of the disk tier (:mod:`shardwise.tiers.io_queue`); what differs is
that the files have names, are never written to, and end where they end.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import perf_counter

import torch

from shardwise.errors import OffloadError
from shardwise.tiers.aligned import aligned_empty, padded
from shardwise.tiers.block_io import BlockIO, Extent
from shardwise.tiers.direct_io import open_direct
from shardwise.tiers.disk import CHUNK, CLOSE_S, DEPTH, memory_of
from shardwise.tiers.disk_errors import explain
from shardwise.tiers.io_queue import DiskStats, DiskTransfer, IOQueue

BLOCK = 8 << 20
"""Bytes that are converted at a time."""


class Task:
    """Work of a thread as a :class:`~shardwise.tiers.transfer.Transfer`; an exception of it is raised by ``wait()``."""

    def __init__(self, future: Future[None], stats: DiskStats) -> None:
        self._future, self._stats = future, stats

    def wait(self) -> None:
        if not self._future.done():
            start = perf_counter()
            wait([self._future])
            self._stats.wait_s += perf_counter() - start
        self._future.result()


class StoredFiles:
    """Files of weights, open as long as this lives.

    Args:
        rank: for reports.
        chunk: bytes of one request to the disk; a multiple of 4096.
        depth: requests in flight.
        timeout: seconds without any progress after which a wait ends in an error.

    Attributes:
        stats: what was read, and how long that took.

    Cost: ``depth`` threads, one more if values are converted, and what :class:`~shardwise.tiers.io_queue.IOQueue` says.
    """

    def __init__(self, *, rank: int = 0, chunk: int = CHUNK, depth: int = DEPTH, timeout: float = 300.0) -> None:
        self._where = f"rank {rank}"
        io = BlockIO(self._where, "the folder of the weights", chunk=chunk, direct=True, checksum=False)
        self._queue = IOQueue(io, depth, timeout, ("read",))
        self._extents: dict[Path, Extent] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._blocks: tuple[torch.Tensor, torch.Tensor] | None = None
        self._finalizer = weakref.finalize(self, _close, self._queue)

    @property
    def stats(self) -> DiskStats:
        return self._queue.stats

    def reset_stats(self) -> None:
        """Count from zero."""
        self._queue.stats = DiskStats()

    def require(self, path: Path, nbytes: int) -> None:
        """Open a file.

        Raises:
            OffloadError: it cannot be opened, or has fewer than ``nbytes`` bytes.
        """
        extent = self._extent(path)
        if extent.size < nbytes:
            raise OffloadError(
                f"the file has {extent.size} bytes, and the weights in it end at {nbytes}",
                where=self._queue.io.place(extent),
                fix="it was cut off, or replaced; use another copy, and load the model again",
            )

    def read(self, path: Path, start: int, into: torch.Tensor) -> DiskTransfer:
        """Start to fill ``into`` with the bytes of a file from ``start`` on.

        Args:
            into: ``uint8``, contiguous, on the CPU. It may reach past the end of the file by less than a block; what
                it has there is undefined.

        Raises:
            OffloadError: the file cannot be opened, or an earlier read failed.

        Cost: nothing is copied if the address, the length and ``start`` are multiples of 4096.
        """
        return self._queue.submit("read", self._extent(path), start, memory_of(into))

    def beside(self, work: Callable[[], None]) -> Task:
        """Start work in a thread, after what was given to it before."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="shardwise-convert")
        return Task(self._thread.submit(work), self._queue.stats)

    def convert(self, path: Path, start: int, dtype: torch.dtype, out: torch.Tensor) -> None:
        """Fill ``out`` with numbers of another dtype that begin at a byte of a file. For :meth:`beside`.

        Args:
            dtype: of the file's.
            out: 1-D, contiguous, on the CPU.

        Cost: two buffers of :data:`BLOCK`: one is filled while the other one is converted.
        """
        if self._blocks is None:
            self._blocks = aligned_empty(BLOCK), aligned_empty(BLOCK)
        each = BLOCK // dtype.itemsize
        cuts = range(0, out.numel(), each)
        coming: tuple[DiskTransfer, torch.Tensor, torch.Tensor] | None = None
        for turn, done in enumerate([*cuts, None]):
            before = coming
            if done is not None:
                part = out[done : done + each]
                raw = self._blocks[turn % 2][: part.numel() * dtype.itemsize]
                coming = self.read(path, start + done * dtype.itemsize, raw), raw, part
            if before is not None:
                transfer, raw, part = before
                transfer.ended.wait(self._queue.timeout)  # whoever waits for this thread counts the time
                transfer.wait()
                part.copy_(raw.view(dtype))

    def close(self) -> None:
        """Read nothing more, and return when nothing is written to memory any more (or the disk has hung).

        Raises nothing: what is under way ends in an :class:`OffloadError` for whoever waits for it.
        """
        self._finalizer()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _extent(self, path: Path) -> Extent:
        found = self._extents.get(path)
        if found is None:
            try:
                fd, _ = open_direct(path, os.O_RDONLY | os.O_CLOEXEC)
                size = os.fstat(fd).st_size
            except OSError as error:
                raise explain(
                    error, "opening it to read weights", f"{self._where}, {path}", str(path.parent)
                ) from error
            found = self._extents[path] = Extent(path.name, size, padded(size), str(path), fd, size)
            self._queue.files.add(fd)
        return found


def _close(requests: IOQueue) -> None:
    if os.getpid() == requests.pid:
        requests.stop(
            OffloadError("the files were closed", where=requests.io.where, fix="load the model again"), CLOSE_S
        )
