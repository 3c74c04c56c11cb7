"""Tensors in ``torch.distributed.checkpoint``'s format, written with checksums and read without running anything."""

from __future__ import annotations

import hashlib
import io
import pickle
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import filesystem as dcp_files
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from shardwise.checkpoint.blocks import BlockFile
from shardwise.checkpoint.files import FileEntry
from shardwise.checkpoint.payload import around, known
from shardwise.checkpoint.ranks import LATER, Share, Together, share
from shardwise.comm import World
from shardwise.errors import CheckpointError

METADATA = ".metadata"
_CANNOT_READ = (pickle.PickleError, AttributeError, TypeError, ValueError, RuntimeError, EOFError, KeyError, IndexError)


# --- writing -----------------------------------------------------------------------------------
class Plans(dict[bytes, tuple[SavePlan, Metadata]]):
    """Who writes what, for the next save of the same things: by a hash of what each rank holds."""


@dataclass(frozen=True)
class Written:
    """What this rank has copied into its file, and what the index needs to know besides."""

    results: list[tuple[MetadataIndex, Any]]
    metadata: Metadata
    aliases: Mapping[tuple[str, str], tuple[str, str]]

    def index(self, share: Share) -> bytes:
        """The contents of the index, on rank 0; nothing elsewhere. Collective."""
        everything = share(pickle.dumps(self.results), LATER)
        if World.current().rank:
            return b""
        metadata = replace(
            self.metadata,
            state_dict_metadata=dict(self.metadata.state_dict_metadata),
            planner_data=dict(self.metadata.planner_data),
            storage_data={index: info for data in everything for index, info in pickle.loads(data)},
            storage_meta=StorageMeta(save_id=uuid.uuid4().hex),
            version=CURRENT_DCP_VERSION,
        )
        _add_aliases(metadata, self.aliases)
        return pickle.dumps(metadata)


def write_tensors(
    new_file: Callable[[str], BlockFile],
    tensors: dict[str, Any],
    aliases: Mapping[tuple[str, str], tuple[str, str]],
    doing: str,
    plans: Plans,
) -> Written:
    """Copy what this rank holds into a file. Collective.

    Args:
        new_file: makes a file of that name in the checkpoint.
        tensors: a nest of dicts of tensors. What several ranks bring under one name and place is written by
            one of them.
        aliases: further names (as paths in the nest) of tensors that are in it.
        doing: for errors.
        plans: of earlier saves; takes this one's.

    Cost: a plan per rank, some hundred bytes per slice, to every other rank. One file per rank, and one buffer at a
    time of whatever is not in host memory.
    """
    rank = World.current().rank
    planner = DefaultSavePlanner()
    with Together(doing):
        planner.set_up_planner(tensors, StorageMeta(), rank == 0)
        mine = pickle.dumps(planner.create_local_plan())
    told = share(mine)  # from the ranks of this run, not from a file
    with Together(doing, slow=True):
        key = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in told)).digest()
        if key not in plans:
            decided, metadata = planner.create_global_plan([pickle.loads(data) for data in told])
            plans.clear()
            plans[key] = planner.finish_plan(decided[rank]), metadata
        plan, metadata = plans[key]
        results = _write_items(new_file, plan, planner)
    return Written(results, metadata, aliases)


def _write_items(
    new_file: Callable[[str], BlockFile], plan: SavePlan, planner: SavePlanner
) -> list[tuple[MetadataIndex, Any]]:
    name, results = f"__{World.current().rank}_0.distcp", []
    file = new_file(name) if plan.items else None
    for item in plan.items:
        assert file is not None
        tensor = cast(torch.Tensor, planner.resolve_data(item)).detach()
        start = file.size
        if (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.layout == torch.strided
            and known(tensor.dtype)
        ):
            before, after = around(tensor.dtype, tuple(tensor.shape))
            file.write(before)
            file.put(tensor.contiguous())
            file.write(after)
        else:
            tensor = tensor.cpu()
            if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # a view would be saved with all of its storage
            torch.save(tensor, cast(Any, file))
        results.append((item.index, dcp_files._StorageInfo(name, start, file.size - start)))
    if file is not None:
        file.end()
    return results


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


# --- reading -----------------------------------------------------------------------------------
def parse_metadata(data: bytes, file: Path, files: Mapping[str, FileEntry]) -> Metadata:
    """The index of a checkpoint's tensors.

    Args:
        data: contents of the file.
        file: its path, for errors.
        files: the checkpoint's.

    Raises:
        CheckpointError: it is damaged, or asks for anything but the classes an index is made of.
    """
    try:
        index = IndexUnpickler(io.BytesIO(data), file).load()
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


class IndexUnpickler(pickle.Unpickler):
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
