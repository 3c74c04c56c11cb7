"""Files written in blocks by a few threads, with direct I/O where there is any, and a crc32 per grain.

A checkpoint is written once and read perhaps never: through the page cache it would push out what the run needs, and
on fast disks the copies into the cache cost more than the disk does. Blocks go from aligned buffers instead.

crc32 is by whichever library is there: zlib-ng (``pip install shardwise[fast]``) gives the same number in a quarter of
the time that zlib takes, and on a fast disk checksums are most of what a load computes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.coordination import Progress
from shardwise.checkpoint.manifest import BLOCK, GRAIN, FileEntry
from shardwise.device import StreamsOfThisThread
from shardwise.errors import CheckpointError
from shardwise.tiers.aligned import aligned_empty, padded
from shardwise.tiers.direct_io import naming, open_direct, write_full

if importlib.util.find_spec("zlib_ng") is not None:
    from zlib_ng.zlib_ng import crc32
else:
    from zlib import crc32

_THREADS = 3  # enough to keep a disk busy while one of them computes a checksum
_AHEAD = 2  # buffers beyond those that the threads work on


class BlockBuffers:
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


class WorkerThreads:
    """Some threads, for jobs that none of them waits for.

    The first exception of a job is kept as ``failure``; jobs after it are dropped. :meth:`end` raises it.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._streams = StreamsOfThisThread()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="shardwise-blocks") for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def do(self, job: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
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
        with self._streams.taken():
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
    """A new file. Whoever fills it copies into buffers; the rest happens in worker threads.

    Args:
        path: is made when the first block is written.
        buffers: of this rank's whole save.
        workers: writes each block as soon as it is full; ``None``: they stay in memory until :meth:`give_to`.
        progress: told how many bytes are written.
    """

    def __init__(
        self, path: Path, buffers: BlockBuffers, workers: WorkerThreads | None, progress: Progress | None = None
    ) -> None:
        self.path, self.size, self._progress = path, 0, progress
        self._buffers, self._workers = buffers, workers
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
            buffer.numpy().data[at : at + n] = view[start : start + n]
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

    def give_to(self, workers: WorkerThreads) -> None:
        """Let workers write what has stayed in memory."""
        waiting, self._waiting = self._waiting, []
        for job, after in waiting:
            workers.do(job, after)

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
        self._crcs += [0] * -(-n // GRAIN)
        job, after = partial(self._write, buffer, n, index), partial(self._buffers.give, buffer)
        if self._workers is not None:
            self._workers.do(job, after)
        else:
            self._waiting.append((job, after))

    # --- writing, in a thread --------------------------------------------------------------
    def _write(self, buffer: torch.Tensor, n: int, index: int) -> None:
        view = buffer.numpy().data
        for k, at in enumerate(range(0, n, GRAIN)):
            self._crcs[index + k] = crc32(view[at : min(n, at + GRAIN)])
        with self._opening:
            if self._fd < 0:
                self._fd, _ = open_direct(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        end = padded(n)  # direct I/O knows whole blocks only; the file is cut to its length at the end
        view[n:end] = bytes(end - n)
        with naming(self.path):
            write_full(self._fd, view[:end], index * GRAIN)
        if self._progress is not None:
            self._progress.add(n)

    def close(self) -> FileEntry:
        """Cut to its length and flushed to the disk. After the workers have ended."""
        if self._fd < 0:
            self._fd, _ = open_direct(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with naming(self.path):
            os.ftruncate(self._fd, self.size)
            os.fsync(self._fd)
        self.abandon()
        return FileEntry(self.size, self._crcs)

    def abandon(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def checksum(path: Path) -> FileEntry:
    """Length and checksums of a file that somebody else has written; flushes it to the disk."""
    size, crcs = 0, []
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while part := file.read(GRAIN):
            crcs.append(crc32(part))
            size += len(part)
    return FileEntry(size, crcs)
