"""Finding out what is at a path: whose checkpoint, and which tensors are in it.

Hugging Face folders and single files, Shardwise's own checkpoints, and folders of ``torch.distributed.checkpoint``,
which FSDP1, FSDP2 and Shardwise itself write. DeepSpeed's are in a file of their own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem as dcp_files
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from shardwise.checkpoint import deepspeed_format
from shardwise.checkpoint.directory import read_manifest, read_whole, resolve
from shardwise.checkpoint.manifest import MANIFEST, METADATA, FileEntry, check_sizes
from shardwise.checkpoint.stored_tensor import SAFETENSORS_DTYPES, Section, Segment, Source, Stored, box_segments
from shardwise.checkpoint.torch_format import DAMAGED, PlainDict, StandIn, read_nest, walk
from shardwise.errors import CheckpointError
from shardwise.naming import clean_name, clean_names

_HEADER = 100_000_000  # bytes; the library's own limit
_TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_CANNOT_READ = (pickle.PickleError, AttributeError, TypeError, ValueError, RuntimeError, EOFError, KeyError, IndexError)


def open_source(path: str | os.PathLike[str]) -> Source:
    """Find out what is at a path, and read its index. Any rank may call it alone.

    A path may be a checkpoint of Shardwise, a folder of ``torch.distributed.checkpoint`` (FSDP1 and FSDP2), a Hugging
    Face folder (``model.safetensors`` or ``pytorch_model.bin``, with an index or without), a folder of DeepSpeed
    (the one with ``latest`` in it, or one step's), or one ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file.

    Raises:
        CheckpointError: nothing there, nothing that is known, damaged or cut off, or it holds more than tensors and
            plain values. Nothing is run, whatever the file holds.
    """
    path = Path(os.path.realpath(path))
    if path.is_file() and path.name.startswith("latest"):
        source = _open_folder(path.parent)
    elif path.is_file():
        source = _open_file(path)
    elif path.is_dir():
        source = _open_folder(path)
    else:
        source = _open_shardwise(resolve(path))  # what a killed save left, or an error that says so
    for tensors in source.sections.values():
        for name, stored in tensors.items():
            if not stored.complete:
                raise CheckpointError(
                    f"parts of '{name}' are missing", where=str(source.path), fix="use a complete copy"
                )
    source.sections = {section: _clean(tensors) for section, tensors in source.sections.items() if tensors}
    if not source.sections:
        raise CheckpointError("there are no tensors in it", where=str(source.path), fix="check the path")
    used = {p.file for t in source.everything().values() for p in t.segments}
    source.files |= {file: file.stat().st_size for file in used | set(source.files)}
    return source


def _clean(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    names = clean_names(tensors.keys())
    return {names[name]: stored for name, stored in tensors.items()}


def _open_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        return Source(path, "safetensors", {(): _safetensors(path)})
    if path.name.endswith(".json"):
        return _indexed(path)
    sections, facts = _torch(path)
    return Source(path, "torch", sections, facts, {path: 0})


def _open_folder(path: Path) -> Source:
    names = {p.name for p in path.iterdir()}
    if MANIFEST in names or not names:
        return _open_shardwise(resolve(path))
    if ".metadata" in names:
        return _open_distributed(path)
    if deepspeed_format.step_folder(path) is not None:
        return deepspeed_format.open_folder(path)
    for usual in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if usual in names:
            return _with_config(_open_file(path / usual), path)
    indexes = r".*\.safetensors\.index\.json", r".*\.bin\.index\.json", r".*\.index\.json"
    for pattern in (*indexes, r".*\.safetensors", r".*\.(bin|pt|pth)"):
        found = sorted(name for name in names if re.fullmatch(pattern, name) and not name.startswith("."))
        if len(found) == 1:
            return _with_config(_open_file(path / found[0]), path)
        if found:
            listed = ", ".join(found[:5])
            raise CheckpointError(
                f"holds several files of tensors and no index: {listed}", where=str(path), fix="give one of the files"
            )
    if "config.json" in names:
        raise CheckpointError(
            "a folder of a model without its weights: no .safetensors, no .bin", where=str(path), fix="fetch them, too"
        )
    return _open_shardwise(resolve(path))  # an error that says what is missing


def _with_config(source: Source, folder: Path) -> Source:
    source.path = folder
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return source
    if isinstance(config, dict):
        source.facts |= {k: config[k] for k in ("architectures", "model_type") if k in config}
    return source


# --- safetensors -----------------------------------------------------------------------------------
def _safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one file, by their names and by those that its metadata says they are tied to."""
    size = path.stat().st_size

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(what, where=str(path), fix="use another copy of the file")

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER, size - 8):
            raise damaged("not a safetensors file, or cut off")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        out = {name: _entry(path, name, 8 + length, entry) for name, entry in header.items()}
    except CheckpointError:  # a ValueError too
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"its header is damaged ({type(error).__name__}: {error})") from error
    end = max((t.segments[0].at + t.nbytes for t in out.values()), default=0)
    if end > size:
        raise damaged(f"the file has {size} bytes, and its tensors go to byte {end}: it is cut off")
    for alias, name in metadata.items():
        if name in out and alias not in out:
            out[alias] = out[name]
    return out


def _entry(path: Path, name: str, base: int, entry: Mapping[str, Any]) -> Stored:
    shape, (start, stop) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    dtype = _TORCH_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"'{name}' has dtype {entry['dtype']}, which is not supported", where=str(path), fix="convert it first"
        )
    if min((*shape, start), default=0) < 0 or stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"'{name}' has {stop - start} bytes for shape {shape} of {entry['dtype']}")
    return Stored(dtype, shape, (Segment(path, base + start, 0, prod(shape)),))


# --- several files -----------------------------------------------------------------------------------
def _indexed(path: Path) -> Source:
    """A folder's files through its index."""
    try:
        weight_map = json.loads(path.read_bytes())
        weight_map = weight_map.get("weight_map", weight_map)  # some tools write the inner dict alone
        wanted = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the index is damaged ({type(error).__name__})", where=str(path), fix="use another copy of it"
        ) from error
    safe = ".safetensors" in path.name
    read: Callable[[Path], dict[str, Stored]] = _safetensors if safe else _flat
    tensors: dict[str, Stored] = {}
    files: dict[Path, int] = {}
    for name in dict.fromkeys(wanted.values()):
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError("the index names a file that is not there", where=str(file), fix="fetch it too")
        files[file] = 0
        found = read(file)
        missing = [n for n, f in wanted.items() if f == name and n not in found]
        if missing:
            raise CheckpointError(
                f"the index says that '{missing[0]}' is in it, and it is not", where=str(file), fix="fetch it again"
            )
        tensors.update(found)
    return Source(path, "safetensors" if safe else "torch", {(): tensors}, files=files)


def _flat(path: Path) -> dict[str, Stored]:
    return _torch(path)[0].get((), {})


def _torch(path: Path) -> tuple[dict[Section, dict[str, Stored]], dict[str, Any]]:
    nest = read_nest(path)
    sections: dict[Section, dict[str, Stored]] = {}
    for keys, leaf in walk(nest):
        if isinstance(leaf, Stored):
            sections.setdefault(keys[:-1], {})[keys[-1] if keys else "tensor"] = leaf
    facts = {}
    if isinstance(nest, Mapping):
        facts = {str(k): v for k, v in nest.items() if isinstance(v, (int, float, str))}
    return sections, facts


# --- the index of torch.distributed.checkpoint ------------------------------------------------------
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
    return _with_clean_names(index)


def _with_clean_names(index: Metadata) -> Metadata:
    """An index in which names have no wrappers' components, which older checkpoints and those of others may have."""
    names = clean_names(index.state_dict_metadata.keys())
    nested: Mapping[str, Any] = index.planner_data if isinstance(index.planner_data, Mapping) else {}
    return replace(
        index,
        state_dict_metadata={names[name]: entry for name, entry in index.state_dict_metadata.items()},
        planner_data={names.get(name, name): _clean_keys(keys) for name, keys in nested.items()},
        storage_data={replace(i, fqn=names.get(i.fqn, i.fqn)): info for i, info in index.storage_data.items()},
    )


def _clean_keys(keys: Any) -> Any:
    """The path of a tensor in a nest of dicts."""
    if not isinstance(keys, (tuple, list)):
        return keys
    return tuple(clean_name(key) if isinstance(key, str) else key for key in keys)


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


# --- folders of torch.distributed.checkpoint --------------------------------------------------------
_PATHS = frozenset((m, n) for m in ("pathlib", "pathlib._local") for n in ("PosixPath", "WindowsPath"))


def _open_shardwise(path: Path) -> Source:
    """A checkpoint of Shardwise. Checks its manifest, its files' sizes and its index, but not all checksums."""
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    data = read_whole(path, manifest.files, [METADATA])[METADATA]
    metadata = parse_metadata(data, path / METADATA, manifest.files)
    facts: dict[str, Any] = {"manifest": manifest}
    files = {path / name: entry.size for name, entry in manifest.files.items()} | {path / MANIFEST: 0}
    return Source(path, "shardwise", _sections(path, metadata), facts, files)


def _open_distributed(path: Path) -> Source:
    """A folder that another tool wrote."""
    file = path / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _ForeignIndex(stream, file).load()
        if not isinstance(metadata, Metadata):
            raise _bad(file, "it is not an index of tensors")
        sections = _sections(path, _with_clean_names(metadata))
    except DAMAGED as error:
        if isinstance(error, CheckpointError):
            raise
        raise _bad(file, f"the index of the tensors is damaged ({type(error).__name__}: {error})") from error
    others = sum(isinstance(entry, BytesStorageMetadata) for entry in metadata.state_dict_metadata.values())
    return Source(path, "dcp", sections, {"other values": others} if others else {}, {file: 0})


def _bad(file: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(file), fix="nothing was loaded; use another copy")


class _ForeignIndex(IndexUnpickler):
    """Indexes of other tools may contain the path they were written to."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PATHS:
            return type(name, (StandIn,), {})
        if (module, name) == ("collections", "OrderedDict"):
            return PlainDict
        return super().find_class(module, name)


def _sections(path: Path, metadata: Metadata) -> dict[tuple[str, ...], dict[str, Stored]]:
    nested: Mapping[str, Any] = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    sections: dict[tuple[str, ...], dict[str, Stored]] = {}
    known: dict[Any, Stored] = {}
    sizes: dict[Path, int] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        keys = nested.get(name)
        keys = tuple(map(str, keys)) if isinstance(keys, (tuple, list)) and keys else (name,)
        if not isinstance(entry.properties.dtype, torch.dtype) or min(entry.size, default=0) < 0:
            raise _bad(path / METADATA, f"'{name}' has no dtype or impossible sizes")
        segments: list[Segment] = []
        for chunk in entry.chunks:
            info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            if getattr(info, "transform_descriptors", None):
                raise _bad(path / METADATA, f"'{name}' is compressed or otherwise transformed")
            file = path / info.relative_path
            if Path(info.relative_path).name != info.relative_path:
                raise _bad(path / METADATA, f"'{name}' is not in the folder's own files")
            if min(info.offset, info.length, *chunk.offsets, *chunk.sizes) < 0:
                raise _bad(path / METADATA, f"'{name}' has impossible offsets")
            if file not in sizes:
                sizes[file] = file.stat().st_size if file.is_file() else 0
            if sizes[file] < info.offset + info.length:
                raise _bad(file, "the file is missing or cut off")
            segments += box_segments(entry.size, chunk.offsets, chunk.sizes, file, info.offset, info.length)
        stored = Stored(entry.properties.dtype, tuple(entry.size), tuple(segments))
        # Tied parameters are stored once and listed under all of their names.
        same = (stored.dtype, stored.shape, stored.segments) if stored.segments else name
        sections.setdefault(keys[:-1], {})[keys[-1]] = known.setdefault(same, stored)
    return sections
