"""Tensors filled from a checkpoint: which bytes of its files go where, whatever the ranks held that wrote them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from shardwise.checkpoint import readback
from shardwise.checkpoint.blocks import Crew
from shardwise.checkpoint.files import BLOCK, FileEntry
from shardwise.checkpoint.payload import around, known
from shardwise.checkpoint.readback import Opened, Run, Seen
from shardwise.errors import CheckpointError

_CANNOT_READ = (pickle.PickleError, RuntimeError, ValueError, AssertionError, EOFError, KeyError)


@dataclass(frozen=True)
class _Item:
    """A box of one stored tensor.

    Args:
        name: of the tensor.
        target: makes the tensor that takes the box, when its turn comes.
        file, start, nbytes: the bytes that hold it: a run of the tensor's memory, or all of what ``torch.save`` made.
        before: what must stand before the tensor's memory, and where; ``None``: ``torch.load`` reads it.
        dtype, strides: of the stored tensor.
        box: offsets and lengths in the stored tensor.
    """

    name: str
    target: Callable[[], torch.Tensor]
    file: str
    start: int
    nbytes: int
    before: tuple[int, bytes] | None
    dtype: torch.dtype
    strides: tuple[int, ...]
    box: tuple[torch.Size, torch.Size]

    @property
    def blocks(self) -> range:
        first = self.start if self.before is None else self.before[0]
        return range(first // BLOCK, (self.start + self.nbytes - 1) // BLOCK + 1)

    def run(self, target: torch.Tensor) -> Run | None:
        """The box as elements in a row, if that is what it is in the file and in the target."""
        if self.before is None or not target.is_contiguous() or self.nbytes != target.numel() * self.dtype.itemsize:
            return None
        return Run(self.file, self.start, self.dtype, target.view(-1))

    def values(self, raw: torch.Tensor) -> torch.Tensor:
        """The box, from all of its bytes."""
        if self.before is not None:
            return torch.as_strided(raw.view(self.dtype), self.box[1], self.strides)
        whole = torch.load(io.BytesIO(raw.numpy().data), map_location="cpu", weights_only=True)
        for dim, (offset, length) in enumerate(zip(*self.box, strict=True)):
            whole = whole.narrow(dim, offset, length)
        return whole


class Fill:
    """Fills tensors in place.

    Args:
        path, files, metadata: of the checkpoint.
        tensors: by name; all of them are in the checkpoint with the same shape. Their memory is not looked at before
            it is their turn in :meth:`put`.

    Call :meth:`check`, and on all ranks after it :meth:`put`.
    """

    def __init__(
        self, path: Path, files: Mapping[str, FileEntry], metadata: Metadata, tensors: dict[str, torch.Tensor]
    ) -> None:
        self.path, self.files = path, files
        self._opened = Opened(path, cached=True)
        stored: dict[str, Any] = metadata.state_dict_metadata
        sizes = {(name, tuple(c.offsets)): tuple(c.sizes) for name in tensors for c in stored[name].chunks}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(cast(Any, tensors), metadata, True)
        plan = planner.finish_plan(planner.create_local_plan())
        self.items: dict[str, list[_Item]] = {}
        for read in plan.items:
            item = _item(read, metadata, sizes, planner)
            self.items.setdefault(item.name, []).append(item)

    @property
    def nbytes(self) -> int:
        """Of all tensors, in the files."""
        return sum(item.nbytes for items in self.items.values() for item in items)

    def touched(self) -> dict[str, set[int]]:
        """The blocks, by file, that this rank reads."""
        out: dict[str, set[int]] = {}
        for items in self.items.values():
            for item in items:
                out.setdefault(item.file, set()).update(item.blocks)
        return out

    def check(self, also: Mapping[str, set[int]], seen: Seen | None = None) -> None:
        """Compare what this rank needs.

        Args:
            also: further blocks to compare.
            seen: told the bytes of each block.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        mine = self.touched()
        readback.check(self.path, self.files, mine, seen, keep=True)
        readback.check(self.path, self.files, also, seen)
        for item in (item for items in self.items.values() for item in items if item.before is not None):
            assert item.before is not None
            head = torch.empty(len(item.before[1]), dtype=torch.uint8)
            self._opened.read(item.file, item.before[0], head)
            if head.numpy().tobytes() != item.before[1]:
                raise CheckpointError(
                    f"'{item.name}' is not stored as the index says",
                    where=str(self.path / item.file),
                    fix="nothing was loaded; use another checkpoint, and find out who changed this one",
                )

    def put(self, names: Collection[str], seen: Seen | None = None) -> None:
        """Let tensors have their values.

        Args:
            names: which.
            seen: told the bytes of each part.

        Raises:
            CheckpointError: what was compared before cannot be read now; some tensors may have changed.
        """
        runs: list[Run] = []
        others: list[tuple[_Item, torch.Tensor]] = []
        for item in (item for name in names for item in self.items.get(name, ())):
            target = item.target()
            run = item.run(target)
            if run is not None:
                runs.append(run)
            else:
                others.append((item, target))
        readback.copy(self.path, runs, seen)
        crew = Crew()
        try:
            for item, target in others:
                crew.do(partial(self._put, item, target))
            crew.end()
        finally:
            crew.stop()

    def _put(self, item: _Item, target: torch.Tensor) -> None:
        raw = torch.empty(item.nbytes, dtype=torch.uint8)
        self._opened.read(item.file, item.start, raw)
        try:
            values = item.values(raw)
            if values.shape != target.shape:
                raise ValueError(f"'{item.name}' has another shape than the index says")
            target.copy_(values)
        except _CANNOT_READ as error:
            line = str(error).splitlines()[0] if str(error) else ""
            raise CheckpointError(
                f"its tensors cannot be read ({type(error).__name__}: {line})",
                where=str(self.path),
                fix="what was being loaded into is only partly loaded: load another checkpoint before going on",
            ) from error

    def close(self) -> None:
        """Let go of the files."""
        self._opened.close()


def _item(
    read: ReadItem,
    metadata: Metadata,
    sizes: Mapping[tuple[str, tuple[int, ...]], Sequence[int]],
    planner: DefaultLoadPlanner,
) -> _Item:
    index: MetadataIndex = read.storage_index
    info = cast(Any, metadata.storage_data)[index]
    dtype = cast(Any, metadata.state_dict_metadata[index.fqn]).properties.dtype
    size = tuple(sizes[index.fqn, tuple(index.offset or ())])
    box = (torch.Size(read.storage_offsets), torch.Size(read.lengths))
    strides = tuple(prod(size[i + 1 :]) for i in range(len(size)))
    target = partial(_target, planner, read)
    item = _Item(index.fqn, target, info.relative_path, info.offset, info.length, None, dtype, strides, box)
    if not known(dtype):
        return item
    before, after = around(dtype, size)
    if info.length != len(before) + prod(size) * dtype.itemsize + len(after):
        return item
    first = sum(o * s for o, s in zip(box[0], strides, strict=True))
    count = sum((n - 1) * s for n, s in zip(box[1], strides, strict=True)) + 1 if prod(box[1]) else 0
    start = info.offset + len(before) + first * dtype.itemsize
    return replace(item, before=(info.offset, before), start=start, nbytes=count * dtype.itemsize)


def _target(planner: DefaultLoadPlanner, read: ReadItem) -> torch.Tensor:
    return planner.resolve_tensor(read).detach()
