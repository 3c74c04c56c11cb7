"""Memory that the ranks of one host share: what is long and goes both ways is copied through it, not sent.

Over gloo a message between two processes of a host goes through the loopback device: two copies, and the whole of TCP.
Here its sender copies it into memory of its own that others can read, and gloo carries only where it lies. So tags,
waits, timeouts and reports are what they are without it; a receiver copies from there, or sums from there and needs no
memory for it. A message is out of the sender's hands as soon as it is sent, as with a socket that is never full. That
would let a rank that only sends run ahead without end, so it is for exchanges alone: a rank cannot run ahead of those
whose part it needs.

The memory is a file without a name (``memfd_create``), as large as the host's memory and empty: pages come with the
first message that lies there, and stay for the next ones. A block begins with one byte for each rank, set by each
reader when it has read it. Ranks find each other's files through ``/proc``. Where that cannot be, on another system,
host or in another container, everything is sent.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shardwise import host
from shardwise.errors import CommError

SHORTEST = 512 << 10
"""Bytes. What is shorter is sent: a message of half of it takes as long either way."""

_NAME = "shardwise"
_HEAD = 64  # bytes of a file: who it is of
_LINE = 64  # bytes: where blocks begin, and where in them what was sent begins
_MOST = 1 << 38  # bytes of addresses, at most

Share = Callable[[str, str], list[str]]
"""Tells all ranks a text, under a name, and returns those of all, by rank."""


class _Block(NamedTuple):
    begin: int
    end: int
    readers: tuple[int, ...]


class _File:
    """A file of memory, as this process sees it."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.map = mmap.mmap(fd, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))


class SharedMemory:
    """What this rank sends to others of its host, and what they send.

    Args:
        rank, size: of this process.
        share: tells the other ranks, and hears from them. Collective.

    Attributes:
        reads: ranks whose messages this one can read.
        read_by: ranks that can read those of this one.
        used: bytes of memory that messages have taken, at most; they are kept for the next ones.
    """

    def __init__(self, rank: int, size: int, share: Share) -> None:
        self.rank = rank
        self._flags = -(-size // _LINE) * _LINE
        self._lock = threading.Lock()  # checkpoints are written in another thread
        self._blocks: list[_Block] = []  # not read by all, as far as is known, by place
        self.used = 0
        address, own = _make()
        told = [json.loads(text) for text in share("memory", json.dumps(address))]
        self._of = {r: file for r in range(size) if r != rank and (file := _open(address, told[r])) is not None}
        self.reads = frozenset(self._of)
        self._reads = [frozenset(json.loads(text)) for text in share("read", json.dumps(sorted(self.reads)))]
        self.read_by = frozenset(r for r in range(size) if rank in self._reads[r])
        self._shared: dict[tuple[int, ...], bool] = {}
        if address is not None and own is not None:
            os.close(address.fd)  # everybody has opened it
            self._of[rank] = own

    def is_shared(self, ranks: tuple[int, ...]) -> bool:
        """Does each of these ranks read what each other one sends? All of them know that alike."""
        found = self._shared.get(ranks)
        if found is None:
            found = self._shared[ranks] = all(self._reads[r] | {r} >= set(ranks) for r in ranks)
        return found

    def put(self, tensor: torch.Tensor, readers: Iterable[int]) -> Message:
        """Copy what is sent to where its readers find it.

        Args:
            tensor: contiguous, on the CPU.
            readers: ranks of :attr:`read_by`, or this one; each reads it once.

        Returns:
            The message, as this rank may read it.

        Raises:
            CommError: there is no room left, for nobody reads.
        """
        own = self._of[self.rank]
        assert tensor.is_cpu and tensor.is_contiguous()
        message = Message(self, self.rank, tensor.numel(), tensor.dtype)
        begin = self._place(self._flags + tensor.nbytes, tuple(readers), own.map)
        ctypes.memmove(own.address + begin + self._flags, tensor.data_ptr(), tensor.nbytes)
        message.begin = begin
        return message

    def _place(self, nbytes: int, readers: tuple[int, ...], own: mmap.mmap) -> int:
        """The lowest place that is free, so that few pages are ever used."""
        with self._lock:
            self._blocks = [b for b in self._blocks if not all(own[b.begin + r] for r in b.readers)]
            begin, at = _HEAD, len(self._blocks)
            for i, block in enumerate(self._blocks):
                if block.begin - begin >= nbytes:
                    at = i
                    break
                begin = block.end
            end = begin + -(-nbytes // _LINE) * _LINE
            if end > len(own):
                raise CommError(
                    f"{end >> 20} MiB of messages have not been read by other ranks of this host, more than its memory",
                    where=f"rank {self.rank}",
                    fix="wait for what was started before starting more",
                )
            own[begin : begin + self._flags] = bytes(self._flags)
            self._blocks.insert(at, _Block(begin, end, readers))
            self.used = max(self.used, end)
        return begin

    def at(self, source: int, begin: int) -> tuple[_File, int]:
        """The file that rank ``source`` put a message into, and where it begins there."""
        return self._of[source], begin + self._flags

    def release(self, source: int, begin: int) -> None:
        """This rank has read it."""
        self._of[source].map[begin + self.rank] = 1


class Message:
    """A message in the memory of the rank that sends it.

    Args:
        memory: shared with that rank.
        source: its rank in the world.
        numel, dtype: of the message.

    Attributes:
        note: ``(8,)`` bytes, where it lies. This is what is sent and received instead; then the message has arrived.
    """

    __slots__ = ("_memory", "_word", "dtype", "note", "numel", "source")

    def __init__(self, memory: SharedMemory, source: int, numel: int, dtype: torch.dtype) -> None:
        self._memory, self.source, self.numel, self.dtype = memory, source, numel, dtype
        self._word = bytearray(8)
        self.note = torch.frombuffer(self._word, dtype=torch.uint8)  # no operation, which would count as the model's

    @property
    def begin(self) -> int:
        """Where its block begins."""
        return int.from_bytes(self._word, sys.byteorder)

    @begin.setter
    def begin(self, value: int) -> None:
        self._word[:] = value.to_bytes(8, sys.byteorder)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def tensor(self) -> torch.Tensor:
        """``(numel,)``, the message itself. Its only reader may write to it."""
        file, begin = self._memory.at(self.source, self.begin)
        return torch.frombuffer(file.map, dtype=self.dtype, count=self.numel, offset=begin)

    def release(self) -> None:
        """It has been read."""
        self._memory.release(self.source, self.begin)

    def move(self, into: torch.Tensor) -> None:
        """Copy it to ``(numel,)`` contiguous elements on the CPU. Then it has been read."""
        assert into.is_contiguous() and into.nbytes == self.nbytes
        file, begin = self._memory.at(self.source, self.begin)
        ctypes.memmove(into.data_ptr(), file.address + begin, self.nbytes)
        self.release()


class _Address(NamedTuple):
    """Where the file of a rank is. A word in the file says that it is this one."""

    host: str
    pid: int
    fd: int
    nbytes: int
    word: str


def _make() -> tuple[_Address | None, _File | None]:
    """This rank's file, and where others find it; nothing where there is no such thing."""
    memory = host.memory()
    if memory is None or not hasattr(os, "memfd_create"):
        return None, None
    try:
        # Numbers of processes are those of a namespace.
        where = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        nbytes = min(memory.total, _MOST)
        os.ftruncate(fd, nbytes)
        file = _File(fd, nbytes)
    except OSError:
        return None, None
    word = os.urandom(_HEAD // 2).hex()
    file.map[:_HEAD] = word.encode()
    return _Address(where, os.getpid(), fd, nbytes, word), file


def _open(mine: _Address | None, theirs: Sequence[Any] | None) -> _File | None:
    """Another rank's file; ``None`` where it cannot be reached."""
    if mine is None or theirs is None:
        return None
    their = _Address(*theirs)
    path = f"/proc/{their.pid}/fd/{their.fd}"
    with suppress(OSError):
        if their.host != mine.host or not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            file = _File(fd, their.nbytes)
        finally:
            os.close(fd)
        return file if file.map[:_HEAD] == their.word.encode() else None
    return None
