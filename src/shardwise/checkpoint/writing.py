"""Writing a checkpoint whose contents are known: the plan, the copy of the tensors, the files, the index, the name.

PlannedTensors are in ``torch.distributed.checkpoint``'s format, in files with checksums.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import filesystem as dcp_files
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.utils import find_state_dict_object

from shardwise.checkpoint import directory, small_state
from shardwise.checkpoint.coordination import AllGatherBytes, CollectiveBlock, Progress
from shardwise.checkpoint.manifest import METADATA, FileEntry, Manifest
from shardwise.checkpoint.model_state import Slices
from shardwise.checkpoint.storage_writer import BlockBuffers, BlockFile, WorkerThreads, checksum
from shardwise.checkpoint.torch_format import ALIGN, archivable, archive_around
from shardwise.comm import World
from shardwise.errors import CheckpointError

_SMALL = 1 << 14  # elements


@dataclass
class CachedPlan:
    """Who writes what, kept for the next save of the same things.

    Args:
        key: of what all ranks held; ``""``: there is no plan yet.
        mine: what this rank writes.
        metadata: of everything.
    """

    key: str = ""
    mine: SavePlan = field(default_factory=lambda: SavePlan([]))
    metadata: Metadata = field(default_factory=lambda: Metadata({}))


class PlannedTensors:
    """What this rank holds of all that is saved.

    Args:
        nest: dicts of tensors. What several ranks bring under one name and place is written by one of them.
        aliases: further names (as paths in the nest) of tensors that are in it.
        plan: of the save before; takes this one's.
    """

    def __init__(
        self, nest: dict[str, Any], aliases: Mapping[tuple[str, str], tuple[str, str]], plan: CachedPlan
    ) -> None:
        self.aliases, self.plan = aliases, plan
        self.by_name = dict(_flat(nest))
        self._nest = nest
        told = [[name, str(t.dtype), list(t.shape), _place(t)] for name, t in self.by_name.items()]
        self.key = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def agree(self, keys: Sequence[tuple[str, str]], doing: str) -> None:
        """Have a plan: that of the save before, if no rank holds anything else than then. Collective.

        Args:
            keys: every rank's ``key`` and ``plan.key``.
            doing: for errors.

        Cost: of a new plan, some hundred bytes per slice, to every other rank.
        """
        together = hashlib.sha256("".join(mine for mine, _ in keys).encode()).hexdigest()
        if all(kept == together for _, kept in keys):
            return
        planner, first = DefaultSavePlanner(), World.current().rank == 0
        with CollectiveBlock(doing) as ranks:
            planner.set_up_planner(self._nest, StorageMeta(), first)
            ranks.mine = pickle.dumps(planner.create_local_plan())
        with CollectiveBlock(doing):
            # From the ranks of this run, not from a file.
            decided, metadata = planner.create_global_plan([pickle.loads(data) for data in ranks.gathered])
            plan = planner.finish_plan(decided[World.current().rank])
        self.plan.key, self.plan.mine, self.plan.metadata = together, plan, metadata


def _flat(nest: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """PlannedTensors by their names in the checkpoint."""
    for key, value in nest.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _place(tensor: torch.Tensor) -> Any:
    """Which part of a tensor is here."""
    if isinstance(tensor, Slices):
        return [(start, stop) for start, stop, _ in tensor.pieces]
    chunks = getattr(tensor, "__create_chunk_list__", None)
    return None if chunks is None else [[list(chunk.offsets), list(chunk.sizes)] for chunk in chunks()]


def _is_large(item: WriteItem) -> bool:
    return item.tensor_data is not None and prod(item.tensor_data.chunk.sizes) >= _SMALL


class TensorCopy:
    """The copy of this rank's tensors into its file.

    Args:
        new_file: makes a file of that name in the checkpoint.
        tensors: with a plan.

    Attributes:
        results: what is copied, and where.
    """

    def __init__(self, new_file: Callable[[str], BlockFile], tensors: PlannedTensors) -> None:
        self.results: list[tuple[MetadataIndex, Any]] = []
        self._name, self._tensors, plan = f"__{World.current().rank}_0.distcp", tensors.by_name, tensors.plan
        self._left: list[tuple[MetadataIndex, torch.Tensor, int]] = []
        # Small ones lie together: every rank that loads reads some of them, and a file is read by whole blocks.
        self._items = sorted(plan.mine.items, key=_is_large)
        self._todo = [item.index for item in self._items]
        self._metadata, self._aliases = plan.metadata, tensors.aliases
        self._new_file = new_file
        self._file: BlockFile | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors that this rank writes."""
        data = (item.tensor_data for item in self._items)
        return sum(prod(d.chunk.sizes) * d.properties.dtype.itemsize for d in data if d is not None)

    def begin(self, later: Callable[[str], bool] = lambda _: False) -> None:
        """Copy what may change as soon as the caller goes on.

        Args:
            later: is this name's tensor left alone until :meth:`end` has returned? If it is in host memory, it is
                copied there.

        Cost: one buffer at a time of whatever is not in host memory.
        """
        todo, self._todo, tensors, self._tensors = self._todo, [], self._tensors, {}
        self._file = self._new_file(self._name) if todo else None
        for index in todo:
            whole = tensors[index.fqn]
            if not (later(index.fqn) and (not isinstance(whole, Slices) or whole.in_memory)):
                self._write(index, find_state_dict_object(tensors, index).detach())
                continue
            tensor = find_state_dict_object(tensors, index).detach()
            if _is_plain(tensor) and tensor.device.type == "cpu" and not tensor.is_inference():
                self._left.append((index, tensor, tensor._version))
            else:
                self._write(index, tensor)

    def end(self) -> None:
        """Copy the rest.

        Raises:
            CheckpointError: somebody has changed it meanwhile. Fused kernels and writes past torch are not seen.
        """
        left, self._left = self._left, []
        for index, tensor, _ in left:
            self._write(index, tensor)
        for index, tensor, version in left:
            if tensor._version != version:
                raise CheckpointError(
                    "was changed while it was being copied, and not by its optimizer's step()",
                    where=f"'{index.fqn}'",
                    fix="call wait_for_copy() of what async_save returned before changing optimizer state by hand",
                )
        if self._file is not None:
            self._file.end()

    def _write(self, index: MetadataIndex, tensor: torch.Tensor) -> None:
        file = self._file
        assert file is not None
        file.write(bytes(-file.size % ALIGN))  # elements then begin at multiples of their size
        start = file.size
        if _is_plain(tensor):
            before, after = archive_around(tensor.dtype, tuple(tensor.shape))
            file.write(before)
            file.put(tensor.contiguous())
            file.write(after)
        else:
            tensor = tensor.cpu()
            if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # a view would be saved with all of its storage
            torch.save(tensor, cast(Any, file))
        self.results.append((index, dcp_files._StorageInfo(self._name, start, file.size - start)))

    def index(self, results: Sequence[bytes]) -> bytes:
        """The contents of the index.

        Args:
            results: every rank's, pickled.
        """
        metadata = replace(
            self._metadata,
            state_dict_metadata=dict(self._metadata.state_dict_metadata),
            planner_data=dict(self._metadata.planner_data),
            storage_data={index: info for data in results for index, info in pickle.loads(data)},
            storage_meta=StorageMeta(save_id=uuid.uuid4().hex),
            version=CURRENT_DCP_VERSION,
        )
        _add_aliases(metadata, self._aliases)
        return pickle.dumps(metadata)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Is it its memory and nothing else?"""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and archivable(tensor.dtype)


def _add_aliases(metadata: Metadata, aliases: Mapping[tuple[str, str], tuple[str, str]]) -> None:
    """List tied parameters under all of their names."""
    places: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    for index, info in metadata.storage_data.items():
        places.setdefault(index.fqn, []).append((index, info))
    for alias, original in aliases.items():
        name, source = ".".join(alias), ".".join(original)
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata[source]
        metadata.planner_data[name] = alias
        for index, info in places.get(source, ()):
            metadata.storage_data[MetadataIndex(name, index.offset, index.index)] = info


# --- files and directory --------------------------------------------------------------------------
class OutputFiles:
    """The files that this rank writes."""

    def __init__(self, buffers: BlockBuffers, workers: WorkerThreads | None, plan: CachedPlan) -> None:
        self.buffers, self.workers, self.plan = buffers, workers, plan
        self.folder = Path()
        self.progress: Progress | None = None
        self.by_name: dict[str, BlockFile] = {}

    def new(self, name: str) -> BlockFile:
        file = self.by_name[name] = BlockFile(self.folder / name, self.buffers, self.workers, self.progress)
        return file


@dataclass
class PendingSave:
    """A checkpoint that is about to be written.

    Args:
        files: this rank's.
        manifest: without the files.
        small: names and contents of this rank's files of small state.
        copy: of the tensors.
        changes_in_step: beginnings of the names of tensors that nothing but an optimizer's step changes.
    """

    world: World
    files: OutputFiles
    final: Path
    manifest: Manifest
    small: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]] | None
    files_from: Callable[[Path], None] | None
    copy: TensorCopy
    changes_in_step: tuple[str, ...]
    total_limit: int | None

    @property
    def doing(self) -> str:
        return f"writing checkpoint {self.final}"

    def begin_copy(self) -> None:
        """Copy what may change when the caller goes on. Collective."""
        with _removed_if_it_fails(self.world, self.files, None), CollectiveBlock(self.doing, slow=True):
            self._begin_copy(lambda name: name.startswith(self.changes_in_step))

    def _begin_copy(self, later: Callable[[str], bool]) -> None:
        folder = self.files.folder
        if not folder.is_dir():
            raise CheckpointError(
                "rank 0 has made this directory, and this rank does not see it",
                where=str(folder),
                fix="save to a file system that all hosts share",
            )
        assert self.small is not None
        for name, value in self.small():
            file = self.files.new(name)
            file.write(small_state.dumps(value))
            file.end()
        self.small = None  # it knows what belongs to the caller
        if self.files_from is not None:
            self.files_from(folder)
        self.copy.begin(later)

    def in_background(self, gather: AllGatherBytes, copied: Callable[[], None]) -> None:
        workers = WorkerThreads()
        try:
            self.finish(workers, gather, copied)
        finally:
            workers.stop()

    def finish(self, workers: WorkerThreads, gather: AllGatherBytes, copied: Callable[[], None]) -> None:
        """Have everything on the disk, on all ranks, and let the directory take its name. Collective.

        Args:
            copied: is called when this rank's copy has ended, well or not.
        """
        with _removed_if_it_fails(self.world, self.files, workers):
            with CollectiveBlock(self.doing, slow=True, by=gather) as ranks:
                try:
                    if self.small is not None:
                        self._begin_copy(lambda _: False)
                    self.copy.end()
                finally:
                    copied()
                for file in self.files.by_name.values():  # not before: an update waits for the copy
                    file.give_to(workers)
                ranks.mine = pickle.dumps(self.copy.results)
            with CollectiveBlock(self.doing, slow=True, by=gather) as done:
                if self.world.rank == 0:
                    file = self.files.new(METADATA)
                    file.write(self.copy.index(ranks.gathered))
                    file.end()
                    file.give_to(workers)
                workers.end()
                written = {name: file.close() for name, file in self.files.by_name.items()}
                done.mine = json.dumps({name: [e.size, e.crc32] for name, e in written.items()}).encode()
            with CollectiveBlock(self.doing, slow=True, by=gather):
                if self.world.rank == 0:
                    files = [json.loads(data).items() for data in done.gathered]
                    self._publish({name: FileEntry(*entry) for some in files for name, entry in some})

    def _publish(self, table: dict[str, FileEntry]) -> None:
        folder = self.files.folder
        present = directory.listing(folder)
        if missing := sorted(table.keys() - present):
            raise CheckpointError(
                f"rank 0 does not see '{missing[0]}', which another rank has written",
                where=str(folder),
                fix="save to a file system that all hosts share",
            )
        for name in sorted(present - table.keys()):  # from ``files_from``
            table[name] = checksum(folder / name)
        directory.commit(folder, self.final, replace(self.manifest, files=dict(sorted(table.items()))))
        if self.total_limit is not None:
            directory.delete_oldest(self.final.parent, self.total_limit)


@contextmanager
def _removed_if_it_fails(world: World, out: OutputFiles, workers: WorkerThreads | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if workers is not None:
            workers.drop()
        for file in out.by_name.values():
            file.abandon()
        if world.rank == 0:
            _remove(out.folder)
        raise


def _remove(folder: Path) -> None:
    """Another rank hears of the failure a moment later: a thread of it may just make a file in there."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)
