"""Files of checkpoints read in parts: runs of elements, or any range of a stored tensor without the rest.

Where there are checksums, every grain is compared with its own before anything of it is used. Blocks of grains go past
the page cache into buffers of large pages. From there a grain goes to where it belongs while a core's cache still has
it from the checksum. On a fast disk this is several times as fast as reading into new memory or through the page cache,
whose pages are small. Files of others have no checksums: they are read as they are, straight into their targets where
nothing has to be converted.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from shardwise.checkpoint.manifest import BLOCK, GRAIN, FileEntry, damaged
from shardwise.checkpoint.storage_writer import BlockBuffers, WorkerThreads, crc32
from shardwise.checkpoint.stored_tensor import Layout, Segment, Stored
from shardwise.checkpoint.torch_format import read_nest
from shardwise.errors import CheckpointError
from shardwise.tiers.aligned import padded
from shardwise.tiers.direct_io import naming, open_direct, read_full

_MOST_OPEN = 32


@dataclass
class Run:
    """Elements that lie in a row in a file, and where they go.

    Args:
        file: where they are.
        start: the byte of the first one.
        dtype: of the file's. ``start`` is a multiple of its size, unless the target has it too and is on the host.
        into: 1-D and contiguous; on any device, of any dtype.
    """

    file: Path
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
        target = self.into[(lo - self.start) // item : (hi - self.start) // item]
        target.copy_(grain[lo - begin : hi - begin].view(self.dtype))


class StorageReader:
    """Reads files of checkpoints. Keeps some files open and some blocks of memory.

    Args:
        entries: lengths and checksums of files that have them.
        seen: told the number of bytes after each read; by several threads.

    Attributes:
        nbytes: read so far.

    Cost: of files with checksums, a buffer of one block per thread, of 8 MiB; of others, one block where values have
    to be converted.
    """

    def __init__(
        self, entries: Mapping[Path, FileEntry] | None = None, seen: Callable[[int], None] | None = None
    ) -> None:
        self.entries, self.seen, self.nbytes = entries or {}, seen, 0
        self._lock = threading.Lock()
        self._buffers = BlockBuffers()
        self._descriptors: dict[Path, int] = {}  # of files with checksums, while they are read
        self._files: OrderedDict[Path, FileIO] = OrderedDict()  # of the others
        self._block: torch.Tensor | None = None
        self._origins: dict[tuple[Path, int], tuple[int, Layout | None]] = {}
        self._whole: tuple[tuple[Path, int, Layout], torch.Tensor] | None = None

    def __enter__(self) -> StorageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._block = self._whole = None

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes
        if self.seen is not None:
            self.seen(nbytes)

    # --- runs ----------------------------------------------------------------------------------
    def read(self, runs: Iterable[Run] = (), also: Mapping[Path, Iterable[int]] | None = None) -> None:
        """LoadPlan tensors. Where files have checksums, those of all grains that hold something of them are compared.

        Args:
            runs: in any order; the tensors do not overlap.
            also: further grains to compare, by file.

        Raises:
            CheckpointError: a file is missing, cut off or changed; names it. Some tensors may have their values then,
                none has others.
        """
        wanted: dict[tuple[Path, int], list[Run]] = {(f, i): [] for f, some in (also or {}).items() for i in some}
        for run in runs:
            if run.file not in self.entries:
                self._plain(run)
            else:
                for index in run.grains:
                    wanted.setdefault((run.file, index), []).append(run)
        if wanted:
            self._checked(wanted)

    def _checked(self, wanted: Mapping[tuple[Path, int], list[Run]]) -> None:
        """Read grains, compare each with its checksum, and give what they hold to their runs."""
        workers = WorkerThreads()
        try:
            block: list[list[Run]] = []
            before = (Path(), -1)
            for file, index in sorted(wanted):
                if block and ((file, index - 1) != before or len(block) == BLOCK // GRAIN):
                    workers.do(partial(self._grains, before, block))
                    block = []
                block.append(wanted[file, index])
                before = file, index
            if block:
                workers.do(partial(self._grains, before, block))
            workers.end()
        finally:
            workers.stop()
            for fd in self._descriptors.values():
                os.close(fd)
            self._descriptors.clear()

    def _grains(self, last: tuple[Path, int], grains: list[list[Run]]) -> None:
        """Read some grains in a row, up to ``last``, and give what they hold to their runs."""
        path, first = last[0], last[1] - len(grains) + 1
        entry, begin = self.entries[path], first * GRAIN
        n = min(len(grains) * GRAIN, entry.size - begin)
        buffer = self._buffers.take()
        try:
            view = buffer.numpy().data
            with naming(path):
                got = read_full(self._descriptor(path), view[: padded(n)], begin, at_least=n)
            if got < n:
                raise damaged(path, f"the file has fewer bytes than the {entry.size} it was written with")
            for k, runs in enumerate(grains):
                lo, hi = k * GRAIN, min(n, (k + 1) * GRAIN)
                if crc32(view[lo:hi]) != entry.crc32[first + k]:
                    raise damaged(path, "the contents have changed since it was written (wrong checksum)")
                for run in runs:
                    run.take(begin + lo, buffer[lo:hi])
        finally:
            self._buffers.give(buffer)
        self._count(n)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path], _ = open_direct(path, os.O_RDONLY)
            return self._descriptors[path]

    def _plain(self, run: Run) -> None:
        """Read a run of a file that has no checksums."""
        if run.straight:
            self._bytes(run.file, run.start, run.into.view(torch.uint8))
            return
        if self._block is None:
            self._block = torch.empty(BLOCK, dtype=torch.uint8)
        item, numel = run.dtype.itemsize, run.into.numel()
        each = BLOCK // item
        for done in range(0, numel, each):
            n = min(each, numel - done)
            block = self._block[: n * item]
            self._bytes(run.file, run.start + done * item, block)
            run.into[done : done + n].copy_(block.view(run.dtype))

    # --- stored tensors --------------------------------------------------------------------------
    def read_tensor(self, stored: Stored, start: int, stop: int, out: torch.Tensor) -> None:
        """LoadPlan ``out`` with elements ``start:stop`` of the flattened tensor.

        Args:
            out: contiguous, of any shape, dtype and device; values are converted to its dtype.

        Raises:
            CheckpointError: the file is shorter than it was, or changed.

        Cost: reads straight into ``out`` where dtypes are equal and it is on the CPU, else through one block.
        """
        flat = out.detach().view(-1)
        if stored.values is not None:
            flat.copy_(stored.values.detach().reshape(-1)[start:stop])
            return
        for segment in _overlapping(stored, start, stop):
            if segment.count == 1:
                lo, hi = max(start, segment.start), min(stop, segment.start + segment.length)
                self._run(stored, segment, segment.skip + lo - segment.start, flat[lo - start : hi - start])
            else:
                self._rows(stored, segment, start, stop, flat)

    def prepare(self, stored: Stored, start: int, stop: int) -> None:
        """Find out whether what :meth:`read_tensor` would read is there, so that it does not fail on what can be known.

        Raises:
            CheckpointError: it is not.
        """
        for segment in _overlapping(stored, start, stop):
            self._origin(stored, segment)

    def values(self, stored: Stored, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements ``start:stop`` of the flattened tensor (all of them), new, on the CPU, in the stored dtype."""
        out = torch.empty((stored.numel if stop is None else stop) - start, dtype=stored.dtype)
        self.read_tensor(stored, start, start + out.numel(), out)
        return out

    def _rows(self, stored: Stored, segment: Segment, start: int, stop: int, flat: torch.Tensor) -> None:
        """A part of several runs: whole ones in blocks, those that ``start`` and ``stop`` cut by themselves."""
        first = max(0, -(-(start - segment.start) // segment.step))
        last = min(segment.count, max(0, (stop - segment.start - segment.length) // segment.step + 1))
        for row in sorted({first - 1, last}):
            if 0 <= row < segment.count and not first <= row < last:
                at = segment.start + row * segment.step
                lo, hi = max(start, at), min(stop, at + segment.length)
                if lo < hi:
                    skip = segment.skip + row * segment.length + lo - at
                    self._run(stored, segment, skip, flat[lo - start : hi - start])
        each = max(1, BLOCK // max(1, segment.length * stored.dtype.itemsize))
        for row in range(first, last, each):
            n = min(each, last - row)
            values = torch.empty(n * segment.length, dtype=stored.dtype)
            self._run(stored, segment, segment.skip + row * segment.length, values)
            offset = flat.storage_offset() + segment.start + row * segment.step - start
            flat.as_strided((n, segment.length), (segment.step, 1), offset).copy_(values.view(n, segment.length))

    def _run(self, stored: Stored, segment: Segment, skip: int, out: torch.Tensor) -> None:
        """Elements from ``skip`` on, as many as ``out`` has."""
        at, layout = self._origin(stored, segment)
        if layout is not None:
            values = self._strided(stored, (segment.file, at, layout))
            out.copy_(values[skip : skip + out.numel()])
            return
        self.read([Run(segment.file, at + skip * stored.dtype.itemsize, stored.dtype, out)])

    def _origin(self, stored: Stored, segment: Segment) -> tuple[int, Layout | None]:
        """The byte of the first element that ``skip`` counts from, and the layout if it is not row-major."""
        if not segment.record:
            return segment.at, segment.layout
        key = (segment.file, segment.at)
        if key not in self._origins:
            found = read_nest(segment.file, segment.at, segment.record)
            if not isinstance(found, Stored) or found.dtype != stored.dtype or len(found.segments) != 1:
                what = "does not hold the tensor that the index says"
                raise CheckpointError(what, where=str(segment.file), fix="use another checkpoint")
            needed = segment.skip + segment.length * segment.count
            if found.numel < needed:
                raise CheckpointError(
                    "holds too little of a tensor", where=str(segment.file), fix="use another checkpoint"
                )
            self._origins[key] = (found.segments[0].at, found.segments[0].layout)
        return self._origins[key]

    def _strided(self, stored: Stored, key: tuple[Path, int, Layout]) -> torch.Tensor:
        if self._whole is None or self._whole[0] != key:
            self._whole = None
            sizes, strides = key[2]
            span = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
            values = torch.empty(span, dtype=stored.dtype)
            self._bytes(key[0], key[1], values.view(torch.uint8))
            self._whole = key, values.as_strided(sizes, strides).contiguous().view(-1)
        return self._whole[1]

    def _bytes(self, path: Path, at: int, out: torch.Tensor) -> None:
        if not out.numel():
            return
        file = self._open(path)
        file.seek(at)
        array: Any = out.numpy()
        memory = memoryview(array)
        done = 0
        while done < len(memory):
            n = file.readinto(memory[done : done + 4 * BLOCK])
            if not n:
                raise CheckpointError(
                    f"the file ends at byte {at + done}, in the middle of a tensor",
                    where=str(path),
                    fix="it was cut off, or changed while it was read; use another copy",
                )
            done += n
            self._count(n)

    def _open(self, path: Path) -> FileIO:
        file = self._files.get(path)
        if file is None:
            while len(self._files) >= _MOST_OPEN:
                self._files.popitem(last=False)[1].close()
            file = self._files[path] = path.open("rb", buffering=0)
        self._files.move_to_end(path)
        return file


def _overlapping(stored: Stored, start: int, stop: int) -> Iterator[Segment]:
    for segment in stored.segments:
        if segment.start < stop and start < segment.start + (segment.count - 1) * segment.step + segment.length:
            yield segment
