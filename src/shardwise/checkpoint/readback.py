"""Files of a checkpoint read back: every grain is compared with its checksum before anything of it is used.

Blocks of grains go past the page cache into buffers of large pages. From there a grain goes to where it belongs while a
core's cache still has it from the checksum. On a fast disk this is several times as fast as reading into new memory or
through the page cache, whose pages are small.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from shardwise.checkpoint.blocks import Buffers, Crew
from shardwise.checkpoint.crc import crc32
from shardwise.checkpoint.files import BLOCK, GRAIN, FileEntry, damaged
from shardwise.checkpoint.progress import Progress
from shardwise.checkpoint.rawio import open_file, read_at
from shardwise.tiers.aligned import padded


@dataclass
class Run:
    """Elements that lie in a row in a file, and where they go.

    Args:
        name: of the file.
        start: byte of the first one.
        dtype: of the file's. ``start`` is a multiple of its size, unless the target has it too and is on the host.
        into: 1-D and contiguous; on any device, of any dtype.
    """

    name: str
    start: int
    dtype: torch.dtype
    into: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.into.numel() * self.dtype.itemsize

    @property
    def straight(self) -> bool:
        """Are the file's bytes what belongs into the target's memory?"""
        return self.into.device.type == "cpu" and self.into.dtype == self.dtype

    @property
    def grains(self) -> range:
        return range(self.start // GRAIN, -(-self.stop // GRAIN))

    def take(self, begin: int, grain: torch.Tensor) -> None:
        """Take what belongs here from bytes of the file, ``uint8``, the first of which is ``begin``."""
        lo, hi = max(begin, self.start), min(begin + grain.numel(), self.stop)
        if self.straight:  # half as long again with tensor.copy_, which reads the destination first
            ctypes.memmove(self.into.data_ptr() + lo - self.start, grain.data_ptr() + lo - begin, hi - lo)
            return
        item = self.dtype.itemsize
        part = self.into[(lo - self.start) // item : (hi - self.start) // item]
        part.copy_(grain[lo - begin : hi - begin].view(self.dtype))


class Readback:
    """Reads files of a checkpoint.

    Args:
        path, files: of the checkpoint.
        progress: told how many bytes were read.

    Cost: a buffer of one block per thread, of 8 MiB.
    """

    def __init__(self, path: Path, files: Mapping[str, FileEntry], progress: Progress | None = None) -> None:
        self.path, self.files, self.progress = path, files, progress
        self._buffers = Buffers()
        self._fds: dict[str, int] = {}
        self._opening = threading.Lock()

    def read(self, runs: Iterable[Run] = (), also: Mapping[str, Iterable[int]] | None = None) -> None:
        """Fill tensors, and compare the checksums of all grains that hold something of them.

        Args:
            runs: in any order; the tensors do not overlap.
            also: further grains to compare, by file.

        Raises:
            CheckpointError: a file is missing, cut off or changed; names it. Some tensors may have their values then,
                none has others.
        """
        wanted: dict[tuple[str, int], list[Run]] = {(n, i): [] for n, some in (also or {}).items() for i in some}
        for run in runs:
            for index in run.grains:
                wanted.setdefault((run.name, index), []).append(run)
        if not wanted:
            return
        crew = Crew()
        try:
            block: list[list[Run]] = []
            before = ("", -1)
            for name, index in sorted(wanted):
                if block and ((name, index - 1) != before or len(block) == BLOCK // GRAIN):
                    crew.do(partial(self._block, before, block))
                    block = []
                block.append(wanted[name, index])
                before = name, index
            if block:
                crew.do(partial(self._block, before, block))
            crew.end()
        finally:
            crew.stop()
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()

    def _block(self, last: tuple[str, int], grains: list[list[Run]]) -> None:
        """Read some grains in a row, up to ``last``, and give what they hold to their runs."""
        name, first = last[0], last[1] - len(grains) + 1
        path, entry, begin = self.path / name, self.files[name], first * GRAIN
        n = min(len(grains) * GRAIN, entry.size - begin)
        buffer = self._buffers.take()
        try:
            view = buffer.numpy().data
            if read_at(self._fd(name), view[: padded(n)], begin, path, at_least=n) < n:
                raise damaged(path, f"the file has fewer bytes than the {entry.size} it was written with")
            for k, runs in enumerate(grains):
                lo, hi = k * GRAIN, min(n, (k + 1) * GRAIN)
                if crc32(view[lo:hi]) != entry.crc32[first + k]:
                    raise damaged(path, "the contents have changed since it was written (wrong checksum)")
                for run in runs:
                    run.take(begin + lo, buffer[lo:hi])
        finally:
            self._buffers.give(buffer)
        if self.progress is not None:
            self.progress.add(n)

    def _fd(self, name: str) -> int:
        with self._opening:
            if name not in self._fds:
                self._fds[name] = open_file(self.path / name, os.O_RDONLY)
            return self._fds[name]
