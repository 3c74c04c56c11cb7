"""Tensors in ``torch.distributed.checkpoint``'s format, written with checksums and read without running anything."""

from __future__ import annotations

import dataclasses
import os
import pickle
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import filesystem as dcp_files
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardwise.checkpoint.files import FileEntry
from shardwise.checkpoint.ranks import Together, share
from shardwise.comm import World
from shardwise.errors import CheckpointError

METADATA = ".metadata"
_CANNOT_READ = (pickle.PickleError, AttributeError, TypeError, ValueError, RuntimeError, EOFError, KeyError, IndexError)


# --- writing -----------------------------------------------------------------------------------
class Counted:
    """A binary file that knows the length and the crc32 of what was written to it."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.crc, self.size = raw, 0, 0

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.size += memoryview(data).nbytes
        return self.raw.write(data)

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self.size, self.crc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class _CountingFiles(FileSystem):
    def __init__(self) -> None:
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            counted = Counted(stream)
            yield counted
        self.entries[Path(path).name] = counted.entry

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


class _Writer(FileSystemWriter):
    """Lists tied parameters under all of their names, and leaves the path of the writing machine out.

    Writes slice by slice. The base class would keep a copy of everything it writes until its file is complete.
    """

    def __init__(self, path: Path, aliases: Mapping[tuple[str, str], tuple[str, str]]) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True, thread_count=1)
        self.fs = self.files = _CountingFiles()
        self.aliases = aliases

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with self.files.create_stream(Path(self.path) / name, "wb") as stream:
                for item in plan.items:
                    tensor = cast(torch.Tensor, planner.resolve_data(item)).detach().cpu()
                    if tensor.untyped_storage().nbytes() != tensor.nbytes:
                        tensor = tensor.clone()  # a view would be saved with all of its storage
                    start = stream.size
                    torch.save(tensor, stream)
                    info = dcp_files._StorageInfo(name, start, stream.size - start)
                    results.append(WriteResult(item.index, stream.size - start, info))
                stream.flush()
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        written: dict[str, list[Any]] = {}
        for result in (r for per_rank in results for r in per_rank):
            written.setdefault(result.index.fqn, []).append(result)
        extra: list[Any] = []
        for alias, original in self.aliases.items():
            name, source = ".".join(alias), ".".join(original)
            metadata.state_dict_metadata[name] = metadata.state_dict_metadata[source]
            metadata.planner_data[name] = alias
            for r in written.get(source, ()):
                index = MetadataIndex(name, r.index.offset, r.index.index)
                extra.append(dataclasses.replace(r, index=index))
        super().finish(metadata, [*results, extra])


def write_tensors(
    path: Path, tensors: dict[str, Any], aliases: Mapping[tuple[str, str], tuple[str, str]]
) -> dict[str, FileEntry]:
    """Write what this rank holds. Collective.

    Args:
        path: an existing directory that all ranks share.
        tensors: a nest of dicts of tensors. What several ranks bring under one name and place is written by
            one of them.
        aliases: further names (as paths in the nest) of tensors that are in it.

    Returns:
        The files this rank wrote.

    Cost: a plan per rank, some hundred bytes per slice, to every other rank. Writes one file per rank.
    """
    world = World.current()
    planner, writer = DefaultSavePlanner(), _Writer(path, aliases)
    doing = f"writing checkpoint {path}"
    with Together(doing):
        planner.set_up_planner(tensors, writer.storage_meta(), world.rank == 0)
        writer.set_up_storage_writer(world.rank == 0, rank=world.rank, use_collectives=True)
        mine = pickle.dumps(writer.prepare_local_plan(planner.create_local_plan()))
    plans = [pickle.loads(data) for data in share(mine)]  # from the ranks of this run, not from a file
    with Together(doing, slow=True):
        plans, metadata = planner.create_global_plan(plans)
        plans = writer.prepare_global_plan(plans)
        plan = planner.finish_plan(plans[world.rank])
        results = writer.write_data(plan, planner).wait()
    everything = [pickle.loads(data) for data in share(pickle.dumps(results))]
    with Together(doing):
        if world.rank == 0:
            writer.finish(metadata, everything)
    return writer.files.entries


# --- reading -----------------------------------------------------------------------------------
def read_metadata(path: Path, files: Mapping[str, FileEntry]) -> Metadata:
    """The index of a checkpoint's tensors.

    Raises:
        CheckpointError: it is damaged, or asks for anything but the classes an index is made of.
    """
    file = path / METADATA
    try:
        with file.open("rb") as stream:
            index = _IndexUnpickler(stream, file).load()
        _check_index(file, index, files)
    except _CANNOT_READ as error:
        if isinstance(error, CheckpointError):
            raise
        raise _bad_index(file, f"the index of the tensors is damaged ({type(error).__name__}: {error})") from error
    return index


def _check_index(file: Path, index: Any, files: Mapping[str, FileEntry]) -> None:
    if not isinstance(index, Metadata):
        raise _bad_index(file, "it is not an index of tensors")
    for name, tensor in index.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise _bad_index(file, f"'{name}' is not a tensor")
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(tensor.size):
            raise _bad_index(file, f"parts of '{name}' are missing")
        for chunk in tensor.chunks:
            if index.storage_data[MetadataIndex(name, chunk.offsets)].relative_path not in files:
                raise _bad_index(file, f"'{name}' is not in the checkpoint's own files")


def _bad_index(file: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(file), fix="nothing was loaded; load another checkpoint")


_INDEX_CLASSES = frozenset(
    {
        (dcp.__name__, name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    } | {(dcp_files.__name__, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
)  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes an index consists of, and nothing else."""

    def __init__(self, stream: Any, file: Path) -> None:
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"refused: it asks for {module}.{name}, which an index of tensors never needs",
            where=str(self.file),
            fix="nothing was loaded or run; use another checkpoint, and find out who changed this one",
        )


class _Reader(FileSystemReader):
    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def read_tensors(path: Path, metadata: Metadata, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors in place with what the checkpoint has under their names. Each rank reads what it needs.

    Args:
        tensors: by name; all of them are in the checkpoint with the same shape.

    Raises:
        CheckpointError: a file cannot be read.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = _Reader(path, metadata)
    try:
        planner.set_up_planner(cast(Any, tensors), metadata, True)
        reader.set_up_storage_reader(metadata, True)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        reader.read_data(plan, planner).wait()
    except (pickle.PickleError, RuntimeError, ValueError, AssertionError, EOFError, KeyError) as error:
        raise CheckpointError(
            f"its tensors cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            where=str(path),
            fix="what was being loaded into is only partly loaded: load another checkpoint before going on",
        ) from error
