"""Files in blocks: a few threads write and read them, with direct I/O where there is any, and a crc32 per block.

A checkpoint is written once and read perhaps never: through the page cache it would push out what the run needs, and
on fast disks the copies into the cache cost more than the disk does. Blocks go from and to aligned buffers instead.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.files import BLOCK, FileEntry, damaged
from shardwise.errors import CheckpointError
from shardwise.tiers.aligned import ALIGN, aligned_empty, padded
from shardwise.tiers.mounts import in_memory

_THREADS = 3  # enough to keep a disk busy while one of them computes a checksum
_AHEAD = 2  # buffers beyond those that the threads work on


class Buffers:
    """Host buffers of one block each.

    Args:
        limit: how many there may be; :meth:`take` then waits for one. ``None``: as many as it takes, and they are
            kept for the next time, because new memory is slow.
    """

    def __init__(self, limit: int | None = _THREADS + _AHEAD) -> None:
        self._free: queue.LifoQueue[torch.Tensor] = queue.LifoQueue()
        self._left = limit

    def take(self) -> torch.Tensor:
        if self._left != 0:
            try:
                return self._free.get_nowait()
            except queue.Empty:
                self._left = None if self._left is None else self._left - 1
                return aligned_empty(BLOCK)
        return self._free.get()

    def give(self, buffer: torch.Tensor) -> None:
        self._free.put(buffer)


class Crew:
    """Some threads, for jobs that none of them waits for.

    The first exception of a job is kept as ``failure``; jobs after it are dropped. :meth:`end` raises it.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="shardwise-blocks") for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def do(self, job: Callable[[], None], after: Callable[[], None]) -> None:
        """Do ``job``, and then in any case ``after``."""
        self._jobs.put((job, after))

    def stop(self) -> None:
        """Wait for all jobs, and end the threads. May be called again."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join()

    def drop(self) -> None:
        """:meth:`stop`, without the jobs that have not begun."""
        if self.failure is None:
            self.failure = CheckpointError("given up")
        self.stop()

    def end(self) -> None:
        """:meth:`stop`, and raise what a job has raised."""
        self.stop()
        if self.failure is not None:
            raise self.failure

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, after = item
            with self:
                if self.failure is None:
                    job()
            after()

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is not None and self.failure is None:
            self.failure = error
        return True


# --- writing -----------------------------------------------------------------------------------
class BlockFile:
    """A new file. Whoever fills it copies into buffers; the rest happens in a crew's threads.

    Args:
        path: is made when the first block is written.
        buffers: of this rank's whole save.
        crew: writes each block as soon as it is full; ``None``: they stay in memory until :meth:`give_to`.
    """

    def __init__(self, path: Path, buffers: Buffers, crew: Crew | None) -> None:
        self.path, self.size = path, 0
        self._buffers, self._crew = buffers, crew
        self._waiting: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self._crcs: list[int] = []
        self._current: torch.Tensor | None = None
        self._used = 0
        self._fd = -1
        self._opening = threading.Lock()

    # --- filling ---------------------------------------------------------------------------
    def write(self, data: Any) -> int:
        """Append bytes, as a binary file does."""
        view = memoryview(data).cast("B")
        for start, buffer, at, n in self._rooms(view.nbytes):
            _view(buffer)[at : at + n] = view[start : start + n]
        return view.nbytes

    def put(self, tensor: torch.Tensor) -> None:
        """Append a contiguous tensor's memory."""
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        on_host = flat.device.type == "cpu"
        source = flat.data_ptr()
        for start, buffer, at, n in self._rooms(flat.numel()):
            if on_host:  # half as long again with tensor.copy_, which reads the destination first
                ctypes.memmove(buffer.data_ptr() + at, source + start, n)
            else:
                buffer[at : at + n].copy_(flat[start : start + n])

    def flush(self) -> None:
        """For those who write to files: what is full is on its way already."""

    def end(self) -> None:
        """Nothing more will be written."""
        if self._current is not None:
            self._pass_on()

    def give_to(self, crew: Crew) -> None:
        """Let a crew write what has stayed in memory."""
        waiting, self._waiting = self._waiting, []
        for job, after in waiting:
            crew.do(job, after)

    def _rooms(self, nbytes: int) -> Iterator[tuple[int, torch.Tensor, int, int]]:
        """Where the next bytes belong: their start, the buffer, their place in it, their number."""
        start = 0
        while start < nbytes:
            if self._current is None:
                self._current, self._used = self._buffers.take(), 0
            n = min(nbytes - start, BLOCK - self._used)
            yield start, self._current, self._used, n
            start, self._used, self.size = start + n, self._used + n, self.size + n
            if self._used == BLOCK:
                self._pass_on()

    def _pass_on(self) -> None:
        buffer, n, index = self._current, self._used, len(self._crcs)
        assert buffer is not None
        self._current = None
        self._crcs.append(0)
        job, after = partial(self._write, buffer, n, index), partial(self._buffers.give, buffer)
        if self._crew is not None:
            self._crew.do(job, after)
        else:
            self._waiting.append((job, after))

    # --- writing, in a thread --------------------------------------------------------------
    def _write(self, buffer: torch.Tensor, n: int, index: int) -> None:
        view = _view(buffer)
        self._crcs[index] = zlib.crc32(view[:n])
        with self._opening:
            if self._fd < 0:
                self._fd = _open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        end = padded(n)  # direct I/O knows whole blocks only; the file is cut to its length at the end
        view[n:end] = bytes(end - n)
        _move(os.pwrite, self._fd, view[:end], index * BLOCK, self.path)

    def close(self) -> FileEntry:
        """Cut to its length and flushed to the disk. After the crew has ended."""
        if self._fd < 0:
            self._fd = _open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with _named(self.path):
            os.ftruncate(self._fd, self.size)
            os.fsync(self._fd)
        self.abandon()
        return FileEntry(self.size, self._crcs)

    def abandon(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


# --- reading -----------------------------------------------------------------------------------
@dataclass
class Range:
    """Bytes of a file that somebody wants, from ``start`` on, in ``into`` (``uint8``, on the host)."""

    start: int
    into: torch.Tensor


@dataclass
class Reading:
    """What to read of one file.

    Args:
        path: of the file.
        size: of the file.
        ranges: in any order; may overlap.
        crcs: of each block; without them nothing is compared.
        also: blocks to compare though nobody wants them.
    """

    path: Path
    size: int
    ranges: Sequence[Range] = ()
    crcs: Sequence[int] | None = None
    also: Iterable[int] = field(default_factory=tuple)

    def blocks(self) -> dict[int, list[Range]]:
        """The blocks that have to be read, and what lies in each."""
        out: dict[int, list[Range]] = {index: [] for index in self.also}
        for one in self.ranges:
            for index in range(one.start // BLOCK, -(-(one.start + one.into.numel()) // BLOCK)):
                out.setdefault(index, []).append(one)
        return out


def read(readings: Iterable[Reading], seen: Callable[[int], None] | None = None) -> None:
    """Read what is wanted, block by block, and compare the checksums of the blocks.

    Args:
        readings: one per file.
        seen: told the bytes of each block, by the thread that has read it.

    Raises:
        CheckpointError: a file is missing, cut off or changed; names it.

    Cost: a few buffers of one block. What is wanted is written to whether or not its checksum is right.
    """
    buffers, crew = Buffers(), Crew()
    files: list[int] = []
    try:
        for reading in readings:
            blocks = reading.blocks()
            if blocks:
                with _named(reading.path):
                    files.append(fd := _open(reading.path, os.O_RDONLY))
            for index, wanted in sorted(blocks.items()):
                buffer = buffers.take()
                crew.do(partial(_read, reading, fd, index, wanted, buffer, seen), partial(buffers.give, buffer))
                if crew.failure is not None:
                    break
        crew.end()
    finally:
        crew.stop()
        for fd in files:
            os.close(fd)


def _read(
    reading: Reading,
    fd: int,
    index: int,
    wanted: list[Range],
    buffer: torch.Tensor,
    seen: Callable[[int], None] | None,
) -> None:
    begin = index * BLOCK
    n = min(BLOCK, reading.size - begin)
    view = _view(buffer)
    if _move(_preadv, fd, view[: padded(n)], begin, reading.path, at_least=n) < n:
        raise damaged(reading.path, f"the file has fewer bytes than the {reading.size} it was written with")
    if reading.crcs is not None and zlib.crc32(view[:n]) != reading.crcs[index]:
        raise damaged(reading.path, "the contents have changed since it was written (wrong checksum)")
    source = buffer.data_ptr()
    for one in wanted:
        lo, hi = max(begin, one.start), min(begin + n, one.start + one.into.numel())
        ctypes.memmove(one.into.data_ptr() + lo - one.start, source + lo - begin, hi - lo)
    if seen is not None:
        seen(n)


# --- the system ----------------------------------------------------------------------------------
def _view(buffer: torch.Tensor) -> memoryview:
    return buffer.numpy().data


def _preadv(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)


def _open(path: Path, flags: int) -> int:
    """Past the page cache, where the file system knows how."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct and not in_memory(path.parent):
        try:
            return os.open(path, flags | direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            flags &= ~os.O_EXCL  # some make the file before they say no
    return os.open(path, flags, 0o666)


def _move(
    call: Callable[[int, memoryview, int], int], fd: int, view: memoryview, offset: int, path: Path, at_least: int = -1
) -> int:
    """Read or write all of ``view``, or until ``at_least`` bytes are there; returns how many."""
    done, enough = 0, view.nbytes if at_least < 0 else at_least
    while done < enough:
        try:
            n = call(fd, view[done:], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and _no_longer_direct(fd):
                continue
            error.filename = str(path)
            raise
        if n == 0:
            break
        done += n
        if done % ALIGN:  # the end of a file, or a disk that is all but full: the rest does not begin at a disk's block
            _no_longer_direct(fd)
    return done


def _no_longer_direct(fd: int) -> bool:
    """Let a file go through the page cache from now on; ``False`` if it does already."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & direct:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~direct)
    return True


class _named:
    """An ``OSError`` inside says which file it was about."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            error.filename = str(self.path)


def checksum(path: Path) -> FileEntry:
    """Length and checksums of a file that somebody else has written; flushes it to the disk."""
    size, crcs = 0, []
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while part := file.read(BLOCK):
            crcs.append(zlib.crc32(part))
            size += len(part)
    return FileEntry(size, crcs)
