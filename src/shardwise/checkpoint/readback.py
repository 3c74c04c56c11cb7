"""Files of a checkpoint read back: first compared with their checksums, then copied to where they belong.

Nothing may change before everything is compared, so a load passes over its bytes twice. For the disk it is once: the
first pass leaves them in the page cache, which is memory that the system takes back when somebody needs it (then the
disk is asked again), and the second copies from there straight into the tensors.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from shardwise.checkpoint.blocks import Crew
from shardwise.checkpoint.files import BLOCK, FileEntry, damaged
from shardwise.checkpoint.rawio import open_file, read_at, will_need
from shardwise.tiers.aligned import aligned_empty, padded

_STEP = 1 << 20  # stays in a core's cache between the copy from the page cache and the checksum
Seen = Callable[[int], None]
"""Told the bytes of each part that was read, by the thread that has read it."""


class _Scratch(threading.local):
    """A buffer per thread."""

    buffer: torch.Tensor | None = None

    def of(self, nbytes: int) -> torch.Tensor:
        if self.buffer is None or self.buffer.numel() < nbytes:
            self.buffer = aligned_empty(nbytes)
        return self.buffer


# --- comparing -----------------------------------------------------------------------------------
def check(
    path: Path,
    files: Mapping[str, FileEntry],
    which: Mapping[str, Iterable[int]],
    seen: Seen | None = None,
    *,
    keep: bool = False,
) -> None:
    """Compare blocks of a checkpoint's files with their checksums.

    Args:
        path, files: of the checkpoint.
        which: the blocks, by file.
        seen: see :data:`Seen`.
        keep: leave them in the page cache, because they will be copied next. Otherwise they go past it.

    Raises:
        CheckpointError: a file is missing, cut off or changed; names it.

    Cost: a buffer per thread: 1 MiB with ``keep``, otherwise a block.
    """
    scratch, opened, crew = _Scratch(), Opened(path, cached=keep), Crew()
    step = _STEP if keep else BLOCK
    try:
        for name, indices in which.items():
            for index in sorted(indices):
                crew.do(partial(_compare, opened, name, files[name], index, scratch, step, seen))
        crew.end()
    finally:
        crew.stop()
        opened.close()


def _compare(
    opened: Opened, name: str, entry: FileEntry, index: int, scratch: _Scratch, step: int, seen: Seen | None
) -> None:
    path, fd = opened.path / name, opened.fd(name)
    begin, end = index * BLOCK, min((index + 1) * BLOCK, entry.size)
    if step < BLOCK:
        will_need(fd, begin, end - begin)
    view, crc = scratch.of(step).numpy().data, 0
    for at in range(begin, end, step):
        n = min(step, end - at)
        if read_at(fd, view[: padded(n)], at, path, at_least=n) < n:
            raise damaged(path, f"the file has fewer bytes than the {entry.size} it was written with")
        crc = zlib.crc32(view[:n], crc)
    if crc != entry.crc32[index]:
        raise damaged(path, "the contents have changed since it was written (wrong checksum)")
    if seen is not None:
        seen(end - begin)


# --- copying -------------------------------------------------------------------------------------
@dataclass
class Run:
    """Elements that lie in a row in a file, and where they go.

    Args:
        name: of the file.
        start: byte of the first one.
        dtype: of the file's.
        into: 1-D and contiguous; on any device, of any dtype.
    """

    name: str
    start: int
    dtype: torch.dtype
    into: torch.Tensor

    def halves(self, most: int) -> list[Run]:
        """Runs of at most so many elements."""
        parts = range(0, self.into.numel(), most)
        size = self.dtype.itemsize
        return [Run(self.name, self.start + at * size, self.dtype, self.into[at : at + most]) for at in parts]


def copy(path: Path, runs: Sequence[Run], seen: Seen | None = None) -> None:
    """Fill tensors from files that :func:`check` has compared.

    Args:
        path: of the checkpoint.
        runs: in any order; the tensors do not overlap.
        seen: see :data:`Seen`.

    Raises:
        CheckpointError: a file is cut off now.

    Cost: nothing for host tensors of the file's dtype; others go through a buffer of one block per thread.
    """
    scratch, opened, crew = _Scratch(), Opened(path, cached=True), Crew()
    try:
        batch: list[Run] = []
        nbytes = 0
        for run in sorted(runs, key=lambda r: (r.name, r.start)):
            for one in run.halves(BLOCK // run.dtype.itemsize):
                batch.append(one)
                nbytes += one.into.numel() * one.dtype.itemsize
                if nbytes >= BLOCK:
                    crew.do(partial(_copy, opened, batch, scratch, seen))
                    batch, nbytes = [], 0
        crew.do(partial(_copy, opened, batch, scratch, seen))
        crew.end()
    finally:
        crew.stop()
        opened.close()


def _copy(opened: Opened, runs: Sequence[Run], scratch: _Scratch, seen: Seen | None) -> None:
    for run in runs:
        n = run.into.numel() * run.dtype.itemsize
        straight = run.into.device.type == "cpu" and run.into.dtype == run.dtype
        raw = run.into.view(torch.uint8) if straight else scratch.of(BLOCK)[:n]
        opened.read(run.name, run.start, raw)
        if not straight:
            run.into.copy_(raw.view(run.dtype))
        if seen is not None:
            seen(n)


class Opened:
    """The files of a checkpoint, opened when they are first read; by several threads.

    Args:
        path: of the checkpoint.
        cached: through the page cache.
    """

    def __init__(self, path: Path, *, cached: bool) -> None:
        self.path, self._cached = path, cached
        self._fds: dict[str, int] = {}
        self._opening = threading.Lock()

    def fd(self, name: str) -> int:
        with self._opening:
            if name not in self._fds:
                self._fds[name] = open_file(self.path / name, os.O_RDONLY, cached=self._cached)
            return self._fds[name]

    def read(self, name: str, start: int, into: torch.Tensor) -> None:
        """Fill a host tensor (``uint8``) from byte ``start`` on.

        Raises:
            CheckpointError: the file ends before.
        """
        if read_at(self.fd(name), into.numpy().data, start, self.path / name) < into.numel():
            raise damaged(self.path / name, f"the file ends before byte {start + into.numel()}")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
