"""Tensors filled from a checkpoint: all of it is compared with its checksums before any of them changes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from shardwise.checkpoint import blocks
from shardwise.checkpoint.blocks import Range
from shardwise.checkpoint.checking import readings
from shardwise.checkpoint.files import BLOCK, FileEntry
from shardwise.checkpoint.payload import around, known
from shardwise.comm import World
from shardwise.errors import CheckpointError
from shardwise.tiers.aligned import aligned_empty

_CANNOT_READ = (pickle.PickleError, RuntimeError, ValueError, AssertionError, EOFError, KeyError)
_LINE = 64


@dataclass
class _Item:
    """A box of one stored tensor, and where it goes.

    Args:
        name: of the tensor.
        file, start, nbytes: the bytes that hold it: a run of the tensor's memory, or all of what ``torch.save`` made.
        target: takes the box.
        before: what must stand before the tensor's memory, and where; ``None``: ``torch.load`` reads it.
        dtype, strides: of the stored tensor.
        box: offsets and lengths in the stored tensor.
        alike: the target's memory is as in the file.
        direct: besides, nothing uses the target yet.
    """

    name: str
    file: str
    start: int
    nbytes: int
    target: torch.Tensor
    before: tuple[int, bytes] | None
    dtype: torch.dtype
    strides: tuple[int, ...]
    box: tuple[torch.Size, torch.Size]
    alike: bool = False
    direct: bool = False

    def values(self, raw: torch.Tensor) -> torch.Tensor:
        """The box, from the bytes."""
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
        tensors: by name; all of them are in the checkpoint with the same shape.
        fresh: addresses of those that nothing uses yet.

    Call :meth:`check`, and on all ranks after it :meth:`put`.
    """

    def __init__(
        self,
        path: Path,
        files: Mapping[str, FileEntry],
        metadata: Metadata,
        tensors: dict[str, torch.Tensor],
        fresh: set[int],
    ) -> None:
        self.path, self.files, self.metadata = path, files, metadata
        self._chunks = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name in tensors
            for chunk in cast(Any, metadata.state_dict_metadata[name]).chunks
        }
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(cast(Any, tensors), metadata, True)
        plan = planner.finish_plan(planner.create_local_plan())
        self.items = [self._item(read, planner.resolve_tensor(read).detach(), fresh) for read in plan.items]
        self._again: list[_Item] = []  # read straight into tensors in use, once everything is compared
        self._batches = self._fitting()
        self._raws: list[torch.Tensor] = []

    def touched(self) -> dict[str, set[int]]:
        """The blocks, by file, that this rank reads."""
        out: dict[str, set[int]] = {}
        for item in self.items:
            first = item.start if item.before is None else item.before[0]
            out.setdefault(item.file, set()).update(range(first // BLOCK, (item.start + item.nbytes - 1) // BLOCK + 1))
        return out

    def check(self, also: Mapping[str, set[int]]) -> None:
        """Read and compare what this rank needs. Changes only tensors that nothing uses.

        Args:
            also: further blocks to compare.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        every = {name: also.get(name, set()) | found for name, found in self.touched().items()}
        every.update({name: found for name, found in also.items() if name not in every})
        heads = [(item, torch.empty(len(item.before[1]), dtype=torch.uint8)) for item in self.items if item.before]
        ranges: dict[str, list[Range]] = {}
        for item, head in heads:
            assert item.before is not None
            ranges.setdefault(item.file, []).append(Range(item.before[0], head))
        for item in self.items:
            if item.direct:
                ranges.setdefault(item.file, []).append(Range(item.start, _memory(item.target)))
        if len(self._batches) == 1 and not self._again:
            self._raws = self._wanted(self._batches[0], ranges)
        blocks.read(readings(self.path, self.files, every, ranges))
        for item, head in heads:
            assert item.before is not None
            if head.numpy().tobytes() != item.before[1]:
                raise CheckpointError(
                    f"'{item.name}' is not stored as the index says",
                    where=str(self.path / item.file),
                    fix="nothing was loaded; use another checkpoint, and find out who changed this one",
                )

    def put(self) -> None:
        """Let the tensors have their values.

        Raises:
            CheckpointError: what was checked before cannot be read now; some tensors may have changed.
        """
        straight: dict[str, list[Range]] = {}
        for item in self._again:
            straight.setdefault(item.file, []).append(Range(item.start, _memory(item.target)))
        if straight:
            blocks.read(readings(self.path, self.files, {}, straight))
        for batch in self._batches:
            raws = self._raws
            if batch and not raws:
                ranges: dict[str, list[Range]] = {}
                raws = self._wanted(batch, ranges)
                blocks.read(readings(self.path, self.files, {}, ranges))
            for item, raw in zip(batch, raws, strict=True):
                try:
                    values = item.values(raw)
                    if values.shape != item.target.shape:
                        raise ValueError(f"'{item.name}' has another shape than the index says")
                    item.target.copy_(values)
                except _CANNOT_READ as error:
                    line = str(error).splitlines()[0] if str(error) else ""
                    raise CheckpointError(
                        f"its tensors cannot be read ({type(error).__name__}: {line})",
                        where=str(self.path),
                        fix="what was being loaded into is only partly loaded: load another checkpoint before going on",
                    ) from error
        self._raws = []

    # --- what to read ------------------------------------------------------------------------
    def _item(self, read: ReadItem, target: torch.Tensor, fresh: set[int]) -> _Item:
        index: MetadataIndex = read.storage_index
        info = self.metadata.storage_data[index]
        properties = cast(Any, self.metadata.state_dict_metadata[index.fqn]).properties
        sizes = self._chunks[index.fqn, tuple(index.offset or ())]
        box = (torch.Size(read.storage_offsets), torch.Size(read.lengths))
        strides = tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))
        item = _Item(
            index.fqn, info.relative_path, info.offset, info.length, target, None, properties.dtype, strides, box
        )
        if not known(item.dtype):
            return item
        before, after = around(item.dtype, sizes)
        if info.length != len(before) + prod(sizes) * item.dtype.itemsize + len(after):
            return item
        first = sum(o * s for o, s in zip(box[0], strides, strict=True))
        count = sum((n - 1) * s for n, s in zip(box[1], strides, strict=True)) + 1 if prod(box[1]) else 0
        item.before = info.offset, before
        item.start = info.offset + len(before) + first * item.dtype.itemsize
        item.nbytes = count * item.dtype.itemsize
        item.alike = (
            target.device.type == "cpu"
            and target.dtype == item.dtype
            and target.is_contiguous()
            and count == target.numel()
        )
        item.direct = item.alike and target.untyped_storage().data_ptr() in fresh
        return item

    def _fitting(self) -> list[list[_Item]]:
        """The items that need memory to be held in, in the order of their files, cut into what there is memory for."""
        held = sorted((i for i in self.items if not i.direct), key=lambda i: (i.file, i.start))
        room = available() // (2 * World.current().local_size)
        if sum(item.nbytes for item in held) > room:
            self._again = [item for item in held if item.alike]
            held = [item for item in held if not item.alike]
        batches: list[list[_Item]] = [[]]
        taken = 0
        for item in held:
            if batches[-1] and taken + item.nbytes > room:
                batches.append([])
                taken = 0
            batches[-1].append(item)
            taken += item.nbytes
        return batches

    def _wanted(self, batch: list[_Item], ranges: dict[str, list[Range]]) -> list[torch.Tensor]:
        """Memory for each item of a batch, and the ranges that fill it."""
        places, end = [], 0
        for item in batch:
            places.append(end)
            end += -(-item.nbytes // _LINE) * _LINE
        memory = aligned_empty(end)
        raws = [memory[at : at + item.nbytes] for at, item in zip(places, batch, strict=True)]
        for item, raw in zip(batch, raws, strict=True):
            ranges.setdefault(item.file, []).append(Range(item.start, raw))
        return raws


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def available() -> int:
    """Bytes of host memory that are free, or can be freed at once."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: as if there were enough
        return 1 << 62
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:  # no group of its own
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
