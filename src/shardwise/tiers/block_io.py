"""One request to the disk: some bytes of an extent, at once, in the thread that asks.

The system wants whole blocks at aligned addresses. What is not goes through a scratch: a read fetches the blocks
around it, a write keeps the bytes beside it.
"""

from __future__ import annotations

import os
import zlib
from typing import Any, Literal

import numpy as np

from shardwise.errors import OffloadError
from shardwise.tiers.aligned import ALIGN, aligned_empty
from shardwise.tiers.direct_io import read_full, write_full
from shardwise.tiers.disk_errors import explain

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Kind = Literal["read", "write"]


class Extent:
    """A run of bytes on the disk: one file, of fixed length, without a name. Made by ``DiskStore.extent``.

    Attributes:
        name: the unit's, for reports.
        nbytes: its length.
        padded: the file's length, a multiple of ``ALIGN``.
        size: how many bytes the file has: ``padded``, unless somebody else wrote it.
        path: the name that the file was made under.
        fd: the open file.
        sums: CRC-32 of what was written, by the byte it begins at; where the store keeps checksums.
    """

    def __init__(self, name: str, nbytes: int, padded: int, path: str, fd: int, size: int | None = None) -> None:
        self.name, self.nbytes, self.padded, self.path, self.fd = name, nbytes, padded, path, fd
        self.size = padded if size is None else size
        self.sums: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"Extent({self.name!r}, nbytes={self.nbytes})"


class BlockIO:
    """How one store reads and writes.

    Args:
        where: rank, for reports.
        folder: the swap folder.
        chunk: bytes of one request at most, a multiple of ``ALIGN``.
        direct: the files bypass the page cache; otherwise it is emptied behind each transfer.
        checksum: check what is read against a CRC-32 per chunk, which stays in memory.
    """

    def __init__(self, where: str, folder: str, *, chunk: int, direct: bool, checksum: bool) -> None:
        self.where, self.folder, self.chunk, self.direct, self.checksum = where, folder, chunk, direct, checksum
        # What is read or written at once: a checksum is over a whole chunk.
        self.block = chunk if checksum else ALIGN

    def place(self, extent: Extent) -> str:
        return f"{self.where}, extent {extent.name!r} ({extent.path})"

    def blocks(self, extent: Extent, start: int, end: int) -> tuple[int, int]:
        """``[start, end)`` rounded outward to what is read or written at once."""
        return start // self.block * self.block, min(-(-end // self.block) * self.block, extent.padded)

    def move(self, kind: Kind, extent: Extent, start: int, data: Bytes, scratch: Bytes | None) -> Bytes | None:
        """Read or write ``data`` at ``start`` of an extent. It must not cross a multiple of ``chunk``.

        Args:
            scratch: the calling thread's, ``None`` until it needed one.

        Returns:
            The scratch, for the next call.

        Raises:
            OffloadError: short, full, or not what was written.
            OSError: the system's other errors.
        """
        end = start + len(data)
        begin, stop = self.blocks(extent, start, end)
        if (begin, stop) == (start, end) and (not self.direct or data.ctypes.data % ALIGN == 0):
            (self.read if kind == "read" else self.write)(extent, data, begin)
            return scratch
        if scratch is None:
            scratch = aligned_empty(self.chunk).numpy()
        whole = scratch[: stop - begin]
        if kind == "read":
            self.read(extent, whole, begin)
            np.copyto(data, whole[start - begin : end - begin])
        else:
            self._around(extent, whole, begin, start, end)
            np.copyto(whole[start - begin : end - begin], data)
            self.write(extent, whole, begin)
        return scratch

    def _around(self, extent: Extent, whole: Bytes, begin: int, start: int, end: int) -> None:
        """Fill ``whole`` with the bytes of its blocks that a write does not replace; beyond the extent, zeros."""
        stop = begin + len(whole)
        if start > begin or (end < stop and end < extent.nbytes):
            self.read(extent, whole, begin)
        else:
            whole[end - begin :] = 0

    def read(self, extent: Extent, whole: Bytes, begin: int) -> None:
        there = max(0, min(len(whole), extent.size - begin))
        if read_full(extent.fd, whole.data, begin, at_least=there) < there:
            raise OffloadError(
                f"the file ends at {os.fstat(extent.fd).st_size} of {extent.size} bytes"
                f" (read of {len(whole)} bytes at {begin})",
                where=self.place(extent),
                fix="something has cut it short: look for programs that clean up on this disk, and at its health",
            )
        if self.checksum:
            expected = extent.sums.get(begin)
            if expected is not None and zlib.crc32(whole.data) != expected:
                raise OffloadError(
                    f"bytes {begin} to {begin + len(whole)} are not those that were written (checksum differs)",
                    where=self.place(extent),
                    fix="do not trust this disk; continue from the last checkpoint on another one",
                )

    def write(self, extent: Extent, whole: Bytes, begin: int) -> None:
        if self.checksum:
            extent.sums[begin] = zlib.crc32(whole.data)
        if (done := write_full(extent.fd, whole.data, begin)) < len(whole):
            raise OffloadError(
                f"the disk took only {done} of {len(whole)} bytes at {begin}",
                where=self.place(extent),
                fix="look for limits on file sizes (`ulimit -f`, quotas) and free space there",
            )

    def drop_cache(self, kind: Kind, extent: Extent, begin: int, end: int) -> OffloadError | None:
        """Without direct I/O the bytes would fill the page cache: write them out and let go of them."""
        try:
            if kind == "write":
                getattr(os, "fdatasync", os.fsync)(extent.fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(extent.fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
        except OSError as found:
            return explain(found, f"writing out {end - begin} bytes at {begin}", self.place(extent), self.folder)
        return None
