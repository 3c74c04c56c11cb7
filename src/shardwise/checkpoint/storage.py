"""Tensors in ``torch.distributed.checkpoint``'s format, written with checksums and read without running anything."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import filesystem as dcp_files
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.utils import find_state_dict_object

from shardwise.checkpoint.blocks import BlockFile
from shardwise.checkpoint.files import FileEntry
from shardwise.checkpoint.payload import ALIGN, around, known
from shardwise.checkpoint.ranks import Together
from shardwise.checkpoint.slices import Slices
from shardwise.comm import World
from shardwise.errors import CheckpointError

METADATA = ".metadata"
_SMALL = 1 << 14  # elements
_CANNOT_READ = (pickle.PickleError, AttributeError, TypeError, ValueError, RuntimeError, EOFError, KeyError, IndexError)


# --- writing -----------------------------------------------------------------------------------
@dataclass
class Plans:
    """Who writes what, kept for the next save of the same things.

    Args:
        key: of what all ranks held; ``""``: there is no plan yet.
        mine: what this rank writes.
        metadata: of everything.
    """

    key: str = ""
    mine: SavePlan = field(default_factory=lambda: SavePlan([]))
    metadata: Metadata = field(default_factory=lambda: Metadata({}))


class Tensors:
    """What this rank holds of all that is saved.

    Args:
        nest: dicts of tensors. What several ranks bring under one name and place is written by one of them.
        aliases: further names (as paths in the nest) of tensors that are in it.
        plans: of the save before; takes this one's.
    """

    def __init__(self, nest: dict[str, Any], aliases: Mapping[tuple[str, str], tuple[str, str]], plans: Plans) -> None:
        self.aliases, self.plans = aliases, plans
        self.by_name = dict(_flat(nest))
        self._nest = nest
        told = [[name, str(t.dtype), list(t.shape), _place(t)] for name, t in self.by_name.items()]
        self.key = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def agree(self, keys: Sequence[tuple[str, str]], doing: str) -> None:
        """Have a plan: that of the save before, if no rank holds anything else than then. Collective.

        Args:
            keys: every rank's ``key`` and ``plans.key``.
            doing: for errors.

        Cost: of a new plan, some hundred bytes per slice, to every other rank.
        """
        together = hashlib.sha256("".join(mine for mine, _ in keys).encode()).hexdigest()
        if all(kept == together for _, kept in keys):
            return
        planner, first = DefaultSavePlanner(), World.current().rank == 0
        with Together(doing) as ranks:
            planner.set_up_planner(self._nest, StorageMeta(), first)
            ranks.mine = pickle.dumps(planner.create_local_plan())
        with Together(doing):
            # From the ranks of this run, not from a file.
            decided, metadata = planner.create_global_plan([pickle.loads(data) for data in ranks.told])
            plan = planner.finish_plan(decided[World.current().rank])
        self.plans.key, self.plans.mine, self.plans.metadata = together, plan, metadata


def _flat(nest: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by their names in the checkpoint."""
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


class Copy:
    """The copy of this rank's tensors into its file.

    Args:
        new_file: makes a file of that name in the checkpoint.
        tensors: with a plan.

    Attributes:
        results: what is copied, and where.
    """

    def __init__(self, new_file: Callable[[str], BlockFile], tensors: Tensors) -> None:
        self.results: list[tuple[MetadataIndex, Any]] = []
        self._name, self._tensors, plans = f"__{World.current().rank}_0.distcp", tensors.by_name, tensors.plans
        self._left: list[tuple[MetadataIndex, torch.Tensor, int]] = []
        # Small ones lie together: every rank that loads reads some of them, and a file is read by whole blocks.
        self._items = sorted(plans.mine.items, key=_is_large)
        self._todo = [item.index for item in self._items]
        self._metadata, self._aliases = plans.metadata, tensors.aliases
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
            if not (later(index.fqn) and (not isinstance(whole, Slices) or whole.here)):
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
            before, after = around(tensor.dtype, tuple(tensor.shape))
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
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and known(tensor.dtype)


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
