"""Reads and writes under way: threads that carry out a transfer's chunks, and the order between transfers.

Reads and writes have threads of their own, so that a unit can be read while another one is written. Every call into
the system (and every checksum) releases the GIL.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter

import numpy as np

from shardwise import events
from shardwise.errors import OffloadError
from shardwise.tiers.block_io import BlockIO, Bytes, Extent, Kind
from shardwise.tiers.disk_errors import again, explain


@dataclass
class DiskStats:
    """Totals of one store.

    Attributes:
        bytes_read, bytes_written: as asked for, without padding.
        reads, writes: transfers that ended.
        read_s, write_s: seconds with a read (a write) under way.
        busy_s: seconds with anything under way.
        wait_s: seconds that callers were blocked in ``wait()``.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    reads: int = 0
    writes: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    busy_s: float = 0.0
    wait_s: float = 0.0

    @property
    def hidden(self) -> float:
        """The part of ``busy_s`` in which nobody waited, 0 to 1."""
        return 0.0 if self.busy_s == 0 else max(0.0, 1 - self.wait_s / self.busy_s)


_NONE: Bytes = np.empty(0, np.uint8)


class DiskTransfer:
    """Bytes on their way to or from a disk; a :class:`shardwise.tiers.transfer.Transfer`.

    Until ``wait()`` has returned, the tensor must not be changed (a write) or looked at (a read).
    """

    def __init__(self, disk: IOQueue, kind: Kind, extent: Extent, start: int, data: Bytes) -> None:
        self.disk, self.kind, self.extent, self.start, self.data = disk, kind, extent, start, data
        self.begin, self.end = disk.io.blocks(extent, start, start + len(data))
        self.ended = threading.Event()
        self.error: OffloadError | None = None
        self.left = self.blockers = 0
        self.next: list[DiskTransfer] = []

    @property
    def name(self) -> str:
        """How listeners know it."""
        return f"{self.extent.name} {id(self)}"

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.ended.is_set()

    def wait(self) -> None:
        """Return when the bytes are in the tensor, or in the file.

        Raises:
            OffloadError: they are not, now or ever; or nothing moved for the store's timeout.
        """
        if not self.ended.is_set():
            told = bool(events.listeners)
            if told:
                events.wait(self.kind, self.name)
            self.disk.wait(self)
            if told:
                events.waited(self.kind, self.name)
        if self.error is not None:
            raise again(self.error)


class IOQueue:
    """The threads of one store, and what is under way.

    Args:
        io: how to read and write.
        depth: reads in flight, and writes in flight.
        timeout: seconds without any progress after which a wait gives up.
        kinds: what it is asked for.

    Cost: ``depth`` threads of each kind, each with a scratch of one chunk once it met unaligned memory.
    """

    def __init__(self, io: BlockIO, depth: int, timeout: float, kinds: Sequence[Kind] = ("read", "write")) -> None:
        self.io, self.timeout = io, timeout
        self.stats = DiskStats()
        self.lock = threading.RLock()  # the garbage collector may close a store wherever a thread allocates
        self.error: OffloadError | None = None
        self.pid = os.getpid()
        self.files: set[int] = set()
        self.active: dict[Extent, list[DiskTransfer]] = {}  # what is under way, in the order it was started
        self.moved = perf_counter()
        self._busy = {"read": 0, "write": 0}
        self._since = {"read": 0.0, "write": 0.0, "any": 0.0}
        self._queues: dict[Kind, SimpleQueue[tuple[DiskTransfer, int, int] | None]] = {
            kind: SimpleQueue() for kind in kinds
        }
        # Daemons, because Python joins all others before it runs what closes the store at exit.
        self.threads = [
            threading.Thread(target=self._work, args=(queue,), name=f"shardwise-disk-{kind}-{i}", daemon=True)
            for kind, queue in self._queues.items()
            for i in range(depth)
        ]
        self._running = len(self.threads)
        for thread in self.threads:
            thread.start()

    # --- the caller's side -------------------------------------------------------------------
    def submit(self, kind: Kind, extent: Extent, start: int, data: Bytes) -> DiskTransfer:
        """Start a transfer. It begins when those before it on the same bytes have ended."""
        if os.getpid() != self.pid:
            raise OffloadError(
                "a forked process used the swap files of its parent",
                where=self.io.where,
                fix="use them in the parent",
            )
        transfer = DiskTransfer(self, kind, extent, start, data)
        if events.listeners:
            events.start(kind, transfer.name, len(data))
        with self.lock:
            if self.error is not None:
                raise again(self.error)
            if len(data) == 0:
                transfer.ended.set()
                return transfer
            active = self.active.setdefault(extent, [])
            for other in active:
                if other.begin < transfer.end and transfer.begin < other.end and "write" in (kind, other.kind):
                    other.next.append(transfer)
                    transfer.blockers += 1
            active.append(transfer)
            if transfer.blockers == 0:
                self._start(transfer)
        return transfer

    def wait(self, transfer: DiskTransfer) -> None:
        """Block until ``transfer`` has ended, however it did."""
        start = perf_counter()
        try:
            while not transfer.ended.wait(self.timeout):
                if perf_counter() - max(self.moved, start) >= self.timeout:
                    stuck = OffloadError(
                        f"the disk has not finished any request for {self.timeout:g} s",
                        where=self.io.place(transfer.extent),
                        fix="look whether its disk still answers; a larger timeout if it is only slow",
                    )
                    with self.lock:
                        self.error = self.error or stuck
                    raise again(stuck)
        finally:
            with self.lock:
                self.stats.wait_s += perf_counter() - start

    def stop(self, error: OffloadError, timeout: float) -> None:
        """Take nothing more, drop what has not begun, end the threads, and wait for them for ``timeout`` seconds.

        The last thread to end closes the files: a disk that does not answer still uses them.
        """
        with self.lock:
            self.error = self.error or error
        for queue in self._queues.values():
            for _ in self.threads:
                queue.put(None)
        if threading.current_thread() in self.threads:  # the garbage collector ran in it
            return
        end = perf_counter() + timeout
        for thread in self.threads:
            thread.join(max(0.0, end - perf_counter()))

    def drain(self, extent: Extent) -> None:
        """Wait for what is under way on an extent.

        Raises:
            OffloadError: one of those transfers failed.
        """
        with self.lock:
            active = list(self.active.get(extent, ()))
        for transfer in active:
            transfer.wait()

    # --- the threads' side -------------------------------------------------------------------
    def _start(self, transfer: DiskTransfer) -> None:
        """Hand a transfer's chunks to the threads. Under the lock."""
        kind, start, end = transfer.kind, transfer.start, transfer.start + len(transfer.data)
        now = perf_counter()
        if not any(self._busy.values()):
            self._since["any"] = now
        if not self._busy[kind]:
            self._since[kind] = now
        self._busy[kind] += 1
        step = self.io.chunk
        cuts = [start, *range((start // step + 1) * step, end, step), end]
        transfer.left = len(cuts) - 1
        for i in range(transfer.left):
            self._queues[kind].put((transfer, cuts[i], cuts[i + 1]))

    def _work(self, queue: SimpleQueue[tuple[DiskTransfer, int, int] | None]) -> None:
        try:
            self._serve(queue)
        finally:
            with self.lock:
                self._running -= 1
                if not self._running:
                    for fd in self.files:
                        os.close(fd)
                    self.files.clear()

    def _serve(self, queue: SimpleQueue[tuple[DiskTransfer, int, int] | None]) -> None:
        io = self.io
        scratch: Bytes | None = None
        while (item := queue.get()) is not None:
            transfer, start, end = item
            error: OffloadError | None = self.error
            if error is None:
                # If something unforeseen ends this thread, the transfer ends with an error all the same.
                error = OffloadError("an I/O thread ended", where=self.io.where, fix="see its traceback on stderr")
                try:
                    part = slice(start - transfer.start, end - transfer.start)
                    scratch = io.move(transfer.kind, transfer.extent, start, transfer.data[part], scratch)
                    error = None
                except OffloadError as found:
                    error = found
                except OSError as found:
                    doing = f"{transfer.kind} of {end - start} bytes at {start}"
                    error = explain(found, doing, self.io.place(transfer.extent), io.folder)
                    error.__cause__ = found
                finally:
                    self._ended(transfer, error)
            else:
                self._ended(transfer, error)

    def _ended(self, transfer: DiskTransfer, error: OffloadError | None) -> None:
        """One chunk has ended; with the last one the transfer has, and others may begin."""
        with self.lock:
            self.moved = perf_counter()
            transfer.left -= 1
            transfer.error = transfer.error or error
            self.error = self.error or error
            if transfer.left:
                return
        if not self.io.direct and transfer.error is None:
            error = self.io.drop_cache(transfer.kind, transfer.extent, transfer.begin, transfer.end)
        with self.lock:
            self.error = self.error or error
            self._finish(transfer, error)

    def _finish(self, transfer: DiskTransfer, error: OffloadError | None) -> None:
        """Count, and let those go that waited for this transfer. Under the lock."""
        transfer.error = transfer.error or error
        kind, stats, now = transfer.kind, self.stats, perf_counter()
        self._busy[kind] -= 1
        moved = len(transfer.data) if transfer.error is None else 0
        if kind == "read":
            stats.reads, stats.bytes_read = stats.reads + 1, stats.bytes_read + moved
            stats.read_s += now - self._since[kind] if not self._busy[kind] else 0
        else:
            stats.writes, stats.bytes_written = stats.writes + 1, stats.bytes_written + moved
            stats.write_s += now - self._since[kind] if not self._busy[kind] else 0
        if not any(self._busy.values()):
            stats.busy_s += now - self._since["any"]
        over = [transfer]
        while over:
            ended = over.pop()
            active = self.active[ended.extent]
            active.remove(ended)
            if not active:
                del self.active[ended.extent]
            following, ended.next = ended.next, []
            for other in following:
                other.blockers -= 1
                if other.blockers == 0 and self.error is None:
                    self._start(other)
                elif other.blockers == 0:  # what has not begun when the store fails never will
                    other.error = self.error
                    over.append(other)
            ended.data = _NONE  # the transfer may outlive the buffer, and a view of it would keep its bytes
            ended.ended.set()
