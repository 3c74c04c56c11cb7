"""What a load reads of our own checkpoints: boxes of stored tensors, straight into what the ranks hold."""

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

from shardwise.checkpoint.storage_reader import Run, StorageReader
from shardwise.checkpoint.torch_format import archivable, archive_around
from shardwise.errors import CheckpointError, first_line
from shardwise.layout import row_strides

_AT_ONCE = 256 << 20  # bytes of tensors that are taken apart
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
    file: Path
    start: int
    nbytes: int
    before: tuple[int, bytes] | None
    dtype: torch.dtype
    strides: tuple[int, ...]
    box: tuple[torch.Size, torch.Size]

    def run(self, target: torch.Tensor) -> Run | None:
        """The box as elements in a row, if that is what it is in the file and in the target."""
        if self.before is None or not target.is_contiguous() or self.nbytes != target.numel() * self.dtype.itemsize:
            return None
        run = Run(self.file, self.start, self.dtype, target.view(-1))
        return run if run.straight or self.start % self.dtype.itemsize == 0 else None

    def values(self, raw: torch.Tensor) -> torch.Tensor:
        """The box, from all of its bytes."""
        if self.before is not None:
            return torch.as_strided(raw.view(self.dtype), self.box[1], self.strides)
        whole = torch.load(io.BytesIO(raw.numpy().data), map_location="cpu", weights_only=True)
        for dim, (offset, length) in enumerate(zip(*self.box, strict=True)):
            whole = whole.narrow(dim, offset, length)
        return whole


class LoadPlan:
    """Fills tensors in place.

    Args:
        path: of the checkpoint.
        reader: of its files.
        metadata: its index.
        tensors: by name; all of them are in the checkpoint with the same shape. Their memory is not looked at before
            it is their turn in :meth:`read`.
    """

    def __init__(self, path: Path, reader: StorageReader, metadata: Metadata, tensors: dict[str, torch.Tensor]) -> None:
        self._path, self._reader, self._tensors = path, reader, tensors
        stored: dict[str, Any] = metadata.state_dict_metadata
        sizes = {(name, tuple(c.offsets)): tuple(c.sizes) for name in tensors for c in stored[name].chunks}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(cast(Any, tensors), metadata, True)
        plan = planner.finish_plan(planner.create_local_plan())
        self._items: dict[str, list[_Item]] = {}
        for read in plan.items:
            item = _item(path, read, metadata, sizes, planner)
            self._items.setdefault(item.name, []).append(item)

    @property
    def nbytes(self) -> int:
        """Of all tensors, in the files."""
        return sum(item.nbytes for items in self._items.values() for item in items)

    def read(self, names: Collection[str]) -> None:
        """Let tensors have their values.

        Args:
            names: which.

        Raises:
            CheckpointError: a file is missing or damaged, or does not hold what the index says. Some tensors may have
                changed.

        Cost: nothing for runs of elements. What has to be taken apart is in host memory, some tensors at a time.
        """
        runs: list[Run] = []
        heads: list[tuple[_Item, torch.Tensor]] = []
        others: list[list[tuple[_Item, torch.Tensor]]] = [[]]
        held = 0
        for item in (item for name in names for item in self._items.get(name, ())):
            target = item.target()
            run = item.run(target)
            if run is not None and item.before is not None:
                head = torch.empty(len(item.before[1]), dtype=torch.uint8)
                runs += [run, Run(item.file, item.before[0], torch.uint8, head)]
                heads.append((item, head))
                continue
            if held and held + item.nbytes > _AT_ONCE:
                others.append([])
                held = 0
            others[-1].append((item, target))
            held += item.nbytes
        self._reader.read(runs)
        for item, head in heads:
            assert item.before is not None
            if head.numpy().tobytes() != item.before[1]:
                raise self._unreadable(f"'{item.name}' is not stored as the index says")
        for batch in others:
            self._take_apart(batch)

    def forget(self, names: Collection[str]) -> None:
        """Hold tensors no longer."""
        for name in names:
            self._items.pop(name, None)
            del self._tensors[name]

    def _take_apart(self, batch: Sequence[tuple[_Item, torch.Tensor]]) -> None:
        raws = [torch.empty(item.nbytes, dtype=torch.uint8) for item, _ in batch]
        pairs = zip(batch, raws, strict=True)
        self._reader.read(Run(item.file, item.start, torch.uint8, raw) for (item, _), raw in pairs)
        for (item, target), raw in zip(batch, raws, strict=True):
            try:
                values = item.values(raw)
                if values.shape != target.shape:
                    raise ValueError(f"'{item.name}' has another shape than the index says")
                target.copy_(values)
            except _CANNOT_READ as error:
                kind, said = type(error).__name__, first_line(error)
                why = kind if said == kind else f"{kind}: {said}"
                raise self._unreadable(f"its tensors cannot be read ({why})") from error

    def _unreadable(self, what: str) -> CheckpointError:
        return CheckpointError(
            what, where=str(self._path), fix="load another checkpoint, and find out who changed this one"
        )


def _item(
    path: Path,
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
    strides = row_strides(size)
    target = partial(_target, planner, read)
    item = _Item(index.fqn, target, path / info.relative_path, info.offset, info.length, None, dtype, strides, box)
    if not archivable(dtype):
        return item
    before, after = archive_around(dtype, size)
    if info.length != len(before) + prod(size) * dtype.itemsize + len(after):
        return item
    first = sum(o * s for o, s in zip(box[0], strides, strict=True))
    count = sum((n - 1) * s for n, s in zip(box[1], strides, strict=True)) + 1 if prod(box[1]) else 0
    start = info.offset + len(before) + first * dtype.itemsize
    return replace(item, before=(info.offset, before), start=start, nbytes=count * dtype.itemsize)


def _target(planner: DefaultLoadPlanner, read: ReadItem) -> torch.Tensor:
    return planner.resolve_tensor(read).detach()
