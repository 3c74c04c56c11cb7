"""Reading any range of a stored tensor without the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from shardwise.checkpoint.files import BLOCK
from shardwise.checkpoint.stored import Layout, Part, Stored
from shardwise.checkpoint.torchfile import read_nest
from shardwise.errors import CheckpointError

_MOST_OPEN = 32


class Reader:
    """Reads ranges of stored tensors. Keeps some files open and one block of memory.

    Args:
        seen: told the number of bytes after each read.

    Attributes:
        nbytes: read so far.
    """

    def __init__(self, seen: Callable[[int], None] | None = None) -> None:
        self.nbytes, self._seen = 0, seen
        self._files: OrderedDict[Path, FileIO] = OrderedDict()
        self._block: torch.Tensor | None = None
        self._origins: dict[tuple[Path, int], tuple[int, Layout | None]] = {}
        self._whole: tuple[tuple[Path, int], torch.Tensor] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._block = self._whole = None

    def read(self, stored: Stored, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill ``out`` with elements ``start:stop`` of the flattened tensor.

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
        for part in _overlapping(stored, start, stop):
            if part.count == 1:
                lo, hi = max(start, part.start), min(stop, part.start + part.length)
                self._run(stored, part, part.skip + lo - part.start, flat[lo - start : hi - start])
            else:
                self._rows(stored, part, start, stop, flat)

    def prepare(self, stored: Stored, start: int, stop: int) -> None:
        """Find out whether what :meth:`read` would read is there, so that it does not fail on what can be known.

        Raises:
            CheckpointError: it is not.
        """
        for part in _overlapping(stored, start, stop):
            self._origin(stored, part)

    def values(self, stored: Stored, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements ``start:stop`` of the flattened tensor (all of them), new, on the CPU, in the stored dtype."""
        out = torch.empty((stored.numel if stop is None else stop) - start, dtype=stored.dtype)
        self.read(stored, start, start + out.numel(), out)
        return out

    def _rows(self, stored: Stored, part: Part, start: int, stop: int, flat: torch.Tensor) -> None:
        """A part of several runs: whole ones in blocks, those that ``start`` and ``stop`` cut by themselves."""
        first = max(0, -(-(start - part.start) // part.step))
        last = min(part.count, max(0, (stop - part.start - part.length) // part.step + 1))
        for row in sorted({first - 1, last}):
            if 0 <= row < part.count and not first <= row < last:
                at = part.start + row * part.step
                lo, hi = max(start, at), min(stop, at + part.length)
                if lo < hi:
                    skip = part.skip + row * part.length + lo - at
                    self._run(stored, part, skip, flat[lo - start : hi - start])
        each = max(1, BLOCK // max(1, part.length * stored.dtype.itemsize))
        for row in range(first, last, each):
            n = min(each, last - row)
            values = torch.empty(n * part.length, dtype=stored.dtype)
            self._run(stored, part, part.skip + row * part.length, values)
            offset = flat.storage_offset() + part.start + row * part.step - start
            flat.as_strided((n, part.length), (part.step, 1), offset).copy_(values.view(n, part.length))

    def _run(self, stored: Stored, part: Part, skip: int, out: torch.Tensor) -> None:
        """Elements from ``skip`` on, as many as ``out`` has."""
        at, layout = self._origin(stored, part)
        if layout is not None:
            values = self._strided(stored, (part.file, at), layout)
            out.copy_(values[skip : skip + out.numel()])
            return
        item = stored.dtype.itemsize
        at += skip * item
        if out.dtype == stored.dtype and out.device.type == "cpu":
            self._bytes(part.file, at, out.view(torch.uint8))
            return
        if self._block is None:
            self._block = torch.empty(BLOCK, dtype=torch.uint8)
        each = BLOCK // item
        for done in range(0, out.numel(), each):
            n = min(each, out.numel() - done)
            block = self._block[: n * item]
            self._bytes(part.file, at + done * item, block)
            out[done : done + n].copy_(block.view(stored.dtype))

    def _origin(self, stored: Stored, part: Part) -> tuple[int, Layout | None]:
        """The byte of the first element that ``skip`` counts from, and the layout if it is not row-major."""
        if not part.record:
            return part.at, part.layout
        key = (part.file, part.at)
        if key not in self._origins:
            found = read_nest(part.file, part.at, part.record)
            if not isinstance(found, Stored) or found.dtype != stored.dtype or len(found.parts) != 1:
                raise CheckpointError(
                    "does not hold the tensor that the index says", where=str(part.file), fix="use another checkpoint"
                )
            needed = part.skip + part.length * part.count
            if found.numel < needed:
                raise CheckpointError(
                    "holds too little of a tensor", where=str(part.file), fix="use another checkpoint"
                )
            self._origins[key] = (found.parts[0].at, found.parts[0].layout)
        return self._origins[key]

    def _strided(self, stored: Stored, key: tuple[Path, int], layout: Layout) -> torch.Tensor:
        if self._whole is None or self._whole[0] != key:
            self._whole = None
            sizes, strides = layout
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
            self.nbytes += n
            if self._seen is not None:
                self._seen(n)

    def _open(self, path: Path) -> FileIO:
        file = self._files.get(path)
        if file is None:
            while len(self._files) >= _MOST_OPEN:
                self._files.popitem(last=False)[1].close()
            file = self._files[path] = path.open("rb", buffering=0)
        self._files.move_to_end(path)
        return file


def _overlapping(stored: Stored, start: int, stop: int) -> Iterator[Part]:
    for part in stored.parts:
        if part.start < stop and start < part.start + (part.count - 1) * part.step + part.length:
            yield part
