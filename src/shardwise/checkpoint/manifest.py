"""A checkpoint's manifest: format, facts, and every file with its length and checksums."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwise.errors import CheckpointError

FORMAT = 1
"""Version of the directory's format. Readers refuse newer ones."""
MANIFEST = "shardwise.json"
METADATA = ".metadata"
"""torch.distributed.checkpoint's index of the tensors."""
BLOCK = 8 << 20
"""Bytes that are read or written at a time."""
GRAIN = 1 << 19
"""Bytes that have one checksum, so that a part of a file can be read and compared. A part of the format."""


class NewerFormatError(CheckpointError):
    """A newer version of Shardwise wrote it."""


@dataclass(frozen=True)
class FileEntry:
    """A file's length in bytes, and the crc32 of each :data:`GRAIN` of it; the last one may be shorter."""

    size: int
    crc32: list[int]


@dataclass(frozen=True)
class Manifest:
    """What ``shardwise.json`` says about a checkpoint.

    Args:
        world_size: ranks of the run that saved it.
        strategies: the string form of each model's strategy; ``none`` if it was not sharded.
        models, optimizers: their class names, in order.
        torch: version that wrote it.
        saved_at: seconds since 1970, rank 0's clock.
        info: what the caller gave: step, epoch and the like.
        files: every file by its name in the directory.
        format: version of the format.
    """

    world_size: int
    strategies: list[str]
    models: list[str]
    optimizers: list[str]
    torch: str
    saved_at: float
    info: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    format: int = FORMAT

    def dumps(self) -> str:
        body = dataclasses.asdict(self)
        return json.dumps({"shardwise": body, "crc32": _crc_of(body)}, indent=1) + "\n"


def _crc_of(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def parse(path: Path) -> Manifest:
    damaged = CheckpointError(
        "the manifest is damaged", where=str(path), fix="load another checkpoint; this one was changed or cut off"
    )
    try:
        outer = json.loads(path.read_bytes())
        body, crc = outer["shardwise"], outer["crc32"]
        version = int(body["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged from error
    if version > FORMAT:
        raise NewerFormatError(
            f"written in format {version}; this version of Shardwise reads up to {FORMAT}",
            where=str(path),
            fix="pip install --upgrade shardwise",
        )
    try:
        if crc != _crc_of(body):
            raise damaged
        files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
        if any(len(entry.crc32) != -(-entry.size // GRAIN) for entry in files.values()):
            raise damaged
        return Manifest(**body, files=files)
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged from error


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Are all files there, and as long as they were written?

    Raises:
        CheckpointError: names the first that is not.
    """
    for name, entry in manifest.files.items():
        check_size(path / name, entry)


def check_size(path: Path, entry: FileEntry) -> None:
    """The same for one file."""
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(path, "the file is missing") from None
    if size != entry.size:
        raise damaged(path, f"the file has {size} bytes instead of {entry.size}")


def damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=str(path), fix="load another one; 'shardwise checkpoint verify FOLDER' says which are whole"
    )


def entries_at(path: Path, files: Mapping[str, FileEntry]) -> dict[Path, FileEntry]:
    """Files of a checkpoint by where they are."""
    return {path / name: entry for name, entry in files.items()}
