"""Folders of ``torch.distributed.checkpoint``: what FSDP1, FSDP2 and Shardwise itself write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from shardwise.checkpoint.checking import read_whole
from shardwise.checkpoint.files import MANIFEST, check_sizes, read_manifest
from shardwise.checkpoint.storage import METADATA, IndexUnpickler, parse_metadata
from shardwise.checkpoint.stored import Part, Source, Stored, box_parts
from shardwise.checkpoint.torchfile import DAMAGED, PlainDict, StandIn
from shardwise.errors import CheckpointError

_PATHS = frozenset((m, n) for m in ("pathlib", "pathlib._local") for n in ("PosixPath", "WindowsPath"))


def open_shardwise(path: Path) -> Source:
    """A checkpoint of Shardwise. Checks its manifest, its files' sizes and its index, but not all checksums."""
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    data = read_whole(path, manifest.files, [METADATA])[METADATA]
    metadata = parse_metadata(data, path / METADATA, manifest.files)
    facts: dict[str, Any] = {"manifest": manifest}
    files = {path / name: entry.size for name, entry in manifest.files.items()} | {path / MANIFEST: 0}
    return Source(path, "shardwise", _sections(path, metadata), facts, files)


def open_plain(path: Path) -> Source:
    """A folder that another tool wrote."""
    file = path / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _ForeignIndex(stream, file).load()
        if not isinstance(metadata, Metadata):
            raise _bad(file, "it is not an index of tensors")
        sections = _sections(path, metadata)
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
        parts: list[Part] = []
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
            parts += box_parts(entry.size, chunk.offsets, chunk.sizes, file, info.offset, info.length)
        stored = Stored(entry.properties.dtype, tuple(entry.size), tuple(parts))
        # Tied parameters are stored once and listed under all of their names.
        same = (stored.dtype, stored.shape, stored.parts) if stored.parts else name
        sections.setdefault(keys[:-1], {})[keys[-1]] = known.setdefault(same, stored)
    return sections
