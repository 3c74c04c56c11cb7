"""What a disk can do: sequential direct I/O by a few threads, without the store, as a measure for it.

Cost of one call: ``5 * nbytes`` read or written, in a file of twice ``nbytes`` that has no name.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from shardwise.errors import OffloadError
from shardwise.tiers.aligned import aligned_empty
from shardwise.tiers.direct_io import is_direct, open_direct, read_full, write_full
from shardwise.tiers.disk_errors import explain, free_bytes

CHUNK = 4 << 20
DEPTH = 4
Move = Callable[[memoryview, int], int]
Job = tuple[Move, range, list[memoryview]]


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second: ``read`` and ``write`` alone, and ``mixed``, half of each at once (their sum). ``direct`` is
    ``False`` where a file system has no direct I/O: then the figures are the page cache's, not the disk's."""

    read: float
    write: float
    mixed: float
    direct: bool


def probe(
    folder: str | os.PathLike[str], nbytes: int = 256 << 20, *, chunk: int = CHUNK, depth: int = DEPTH
) -> DiskSpeed:
    """Measure the disk that holds ``folder``; arguments and errors as for :class:`Probe`."""
    with Probe(folder, nbytes, chunk=chunk, depth=depth) as disk:
        return DiskSpeed(disk.read(), disk.write(), disk.mixed(), disk.direct)


class Probe:
    """A file to measure with, written once from end to end.

    Args:
        folder: on the disk to measure.
        nbytes: per measurement; rounded up to an even number of chunks. The longer, the less a disk's own cache counts.
        chunk: bytes of one request.
        depth: requests in flight, of reads and of writes each.

    Raises:
        OffloadError: the folder is missing, not writable, or has not twice ``nbytes`` left. The methods raise it if
            the disk fails.
    """

    def __init__(self, folder: str | os.PathLike[str], nbytes: int, *, chunk: int = CHUNK, depth: int = DEPTH) -> None:
        self.base, self.chunk = os.path.abspath(folder), chunk
        self.nbytes = max(1, -(-nbytes // (2 * chunk))) * 2 * chunk
        try:
            if free_bytes(self.base) < 2 * self.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._fd = _file(self.base, 2 * self.nbytes)
        except OSError as error:
            raise explain(error, "measuring the disk", self.base, self.base, 2 * self.nbytes) from error
        slab = aligned_empty(2 * depth * chunk).numpy().data  # the same pages as the store's: size matters, see there
        self._buffers = [slab[i * chunk : (i + 1) * chunk] for i in range(2 * depth)]
        noise = os.urandom(chunk)  # some disks are fast on zeros only
        for buffer in self._buffers:
            buffer[:] = noise
        self._mine, self._others = self._buffers[:depth], self._buffers[depth:]
        try:
            self._sweep((self._put, range(0, 2 * self.nbytes, chunk), self._buffers))
        except OffloadError:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether it is the disk that is measured, and not the page cache."""
        return self._fd >= 0 and is_direct(self._fd)

    def read(self) -> float:
        """Bytes per second of one sequential read."""
        return self.nbytes / self._sweep((self._get, range(0, self.nbytes, self.chunk), self._mine))

    def write(self) -> float:
        """Bytes per second of one sequential write."""
        return self.nbytes / self._sweep((self._put, range(self.nbytes, 2 * self.nbytes, self.chunk), self._mine))

    def mixed(self) -> float:
        """Bytes per second, read and written together, of a sequential read beside a sequential write of as much."""
        ahead = (self._get, range(0, self.nbytes // 2, self.chunk), self._mine)
        behind = (self._put, range(self.nbytes, self.nbytes + self.nbytes // 2, self.chunk), self._others)
        return self.nbytes / self._sweep(ahead, behind)

    def close(self) -> None:
        """Give the space back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, buffer: memoryview, offset: int) -> int:
        return write_full(self._fd, buffer, offset)

    def _get(self, buffer: memoryview, offset: int) -> int:
        return read_full(self._fd, buffer, offset)

    def _sweep(self, *jobs: Job) -> float:
        """Carry out all jobs at once, each with one thread per buffer; returns the seconds until all are done."""
        failed: list[OSError] = []

        def serve(move: Move, offsets: deque[int], buffer: memoryview) -> None:
            try:
                while offsets:
                    offset = offsets.popleft()
                    if move(buffer, offset) != self.chunk:
                        raise OSError(0, "a request moved fewer bytes than asked for")
            except IndexError:  # another thread took the last one
                return
            except OSError as error:
                failed.append(error)

        threads = []
        for move, span, buffers in jobs:
            offsets = deque(span)
            threads += [threading.Thread(target=serve, args=(move, offsets, buffer), daemon=True) for buffer in buffers]
        start = perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = perf_counter() - start
        if failed:
            raise explain(failed[0], "measuring the disk", self.base, self.base) from failed[0]
        return seconds


def _file(base: str, nbytes: int) -> int:
    """A file without a name, past the page cache where that can be."""
    fd, path = tempfile.mkstemp(prefix="shardwise-probe-", dir=base)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)
        return open_direct(path, os.O_RDWR)[0]
    finally:
        os.close(fd)
        os.unlink(path)
