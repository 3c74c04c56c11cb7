"""A checkpoint's directory: how it comes to be at once, its manifest, and where the newest one is."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwise.errors import CheckpointError

FORMAT = 1
"""Version of the directory's format. Readers refuse newer ones."""
MANIFEST = "shardwise.json"
_OURS = re.compile(r"shardwise\.json|\.metadata|__\d+_\d+\.distcp|state\.pt|rank_\d+\.pt")
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}")
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


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a complete checkpoint. Reads one small file; any rank may call it alone.

    Raises:
        CheckpointError: nothing there, not a checkpoint, damaged, or written by a newer version.
    """
    return parse(resolve(Path(directory)) / MANIFEST)


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


# --- one directory ---------------------------------------------------------------------------
def named(directory: Path) -> Path:
    """``folder/latest`` stands for the newest complete checkpoint in a folder, if nothing there has that name."""
    if directory.name != "latest" or directory.exists():
        return directory
    from shardwise.checkpoint.series import latest  # it reads manifests

    found = latest(directory.parent)
    if found is None:
        raise CheckpointError("there is no complete checkpoint", where=str(directory.parent), fix="save one first")
    return found


def resolve(directory: Path) -> Path:
    """The directory to read for a checkpoint of this name.

    That is the directory itself, unless a run was killed between taking the old one away and putting the new
    one in its place: then the new one, which is complete, or else the old one.
    """
    directory = named(directory)
    if (directory / MANIFEST).is_file():
        return directory
    left = list(leftovers(directory))
    for kind in ("tmp", "old"):
        complete = [path for path in left if f".{kind}-" in path.name and (path / MANIFEST).is_file()]
        if complete:
            return max(complete, key=lambda p: p.stat().st_mtime_ns)
    where = str(directory)
    if directory.is_dir():
        raise CheckpointError(
            f"not a complete checkpoint of Shardwise: it has no {MANIFEST}",
            where=where,
            fix="give a directory that checkpoint.save made" + _beside(directory, inside=True),
        )
    raise CheckpointError("there is no such checkpoint", where=where, fix="check the path" + _beside(directory))


def _beside(directory: Path, inside: bool = False) -> str:
    parent = directory if inside else directory.parent
    if not parent.is_dir():
        return ""
    found = sorted(p.name for p in parent.iterdir() if (p / MANIFEST).is_file() and not LEFTOVER.fullmatch(p.name))
    return f"; in {parent} there are {', '.join(found[:5])}" if found else ""


def leftovers(directory: Path) -> Iterator[Path]:
    """What saves of this name that were killed left beside it."""
    if directory.parent.is_dir():
        for path in directory.parent.iterdir():
            match = LEFTOVER.fullmatch(path.name)
            if match and match["name"] == directory.name and path.is_dir():
                yield path


def begin(directory: Path) -> Path:
    """Rank 0: check that a checkpoint may stand at ``directory``, and make the directory to write it in.

    Raises:
        CheckpointError: there is a file, or another tool's checkpoint, which would be lost.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError("a file is in the way", where=str(directory), fix="choose another directory")
    if directory.is_dir() and not (directory / MANIFEST).is_file():
        for path in directory.iterdir():
            if _OURS.fullmatch(path.name):
                raise CheckpointError(
                    f"holds '{path.name}' but no {MANIFEST}: a checkpoint of another tool, or a part of one",
                    where=str(directory),
                    fix="choose another directory, or move that file away",
                )
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f"{directory.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    return temporary


def commit(temporary: Path, directory: Path, manifest: Manifest) -> None:
    """Rank 0: write the manifest and let the directory take its final name.

    Files that somebody else put into an older directory of this name stay in the new one.
    """
    with (temporary / MANIFEST).open("w") as file:
        file.write(manifest.dumps())
        file.flush()
        os.fsync(file.fileno())
    _sync_directories(temporary)
    if directory.exists():
        old = directory.with_name(f"{directory.name}.old-{uuid.uuid4().hex[:8]}")
        directory.rename(old)
        try:
            temporary.rename(directory)
        except OSError:
            old.rename(directory)
            raise
    else:
        temporary.rename(directory)
    sync_directory(directory.parent)
    for left in list(leftovers(directory)):
        if ".old-" in left.name:
            _keep_foreign(left, directory)
        discard(left)


def discard(directory: Path) -> None:
    """Delete a directory so that a kill meanwhile leaves nothing that looks complete."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory)


def _keep_foreign(old: Path, new: Path) -> None:
    try:
        ours = {name.split("/")[0] for name in parse(old / MANIFEST).files}
    except (CheckpointError, OSError):
        ours = set()  # no manifest to ask, so only what has the name of one of our files is ours
    for path in old.iterdir():
        if path.name not in ours and not _OURS.fullmatch(path.name) and not (new / path.name).exists():
            path.rename(new / path.name)


def sync_directory(path: Path) -> None:
    """Flush a directory's own entries."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does this by itself
            raise
    finally:
        os.close(handle)


def _sync_directories(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        sync_directory(Path(folder))


def listing(root: Path) -> set[str]:
    """Every file under ``root``, by its path relative to it."""
    return {(Path(folder) / name).relative_to(root).as_posix() for folder, _, names in os.walk(root) for name in names}


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
