"""A checkpoint's directory: how it comes to be at once, whether it is there and whole, the newest one and old ones."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from shardwise.checkpoint.coordination import CollectiveBlock, Progress
from shardwise.checkpoint.manifest import (
    GRAIN,
    MANIFEST,
    FileEntry,
    Manifest,
    NewerFormatError,
    check_sizes,
    damaged,
    entries_at,
    parse,
)
from shardwise.checkpoint.storage_reader import Run, StorageReader
from shardwise.comm import World
from shardwise.errors import CheckpointError

_OURS = re.compile(r"shardwise\.json|\.metadata|__\d+_\d+\.distcp|state\.pt|rank_\d+\.pt")
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}")


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a complete checkpoint. Reads one small file; any rank may call it alone.

    Raises:
        CheckpointError: nothing there, not a checkpoint, damaged, or written by a newer version.
    """
    return parse(resolve(Path(directory)) / MANIFEST)


# --- one directory ---------------------------------------------------------------------------
def resolve_latest(directory: Path) -> Path:
    """``folder/latest`` stands for the newest complete checkpoint in a folder, if nothing there has that name.

    A file ``latest``, such as ``shardwise.deepspeed`` writes, names it.
    """
    if directory.name == "latest" and directory.is_file():
        tag = directory.read_text(encoding="utf-8", errors="replace").strip()
        if not tag or Path(tag).name != tag or not (directory.parent / tag).is_dir():
            raise CheckpointError(
                "it does not name a folder that is there", where=str(directory), fix="give the folder itself"
            )
        return directory.parent / tag
    if directory.name != "latest" or directory.exists():
        return directory
    found = latest(directory.parent)
    if found is None:
        raise CheckpointError("there is no complete checkpoint", where=str(directory.parent), fix="save one first")
    return found


def resolve(directory: Path) -> Path:
    """The directory to read for a checkpoint of this name.

    That is the directory itself, unless a run was killed between taking the old one away and putting the new
    one in its place: then the new one, which is complete, or else the old one. A folder with a file ``latest`` stands
    for the one that it names.
    """
    directory = resolve_latest(directory)
    if (directory / MANIFEST).is_file():
        return directory
    left = list(leftovers(directory))
    for kind in ("tmp", "old"):
        complete = [path for path in left if f".{kind}-" in path.name and (path / MANIFEST).is_file()]
        if complete:
            return max(complete, key=lambda p: p.stat().st_mtime_ns)
    where = str(directory)
    if (directory / "latest").is_file():
        return resolve(directory / "latest")
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


def make_temporary(directory: Path) -> Path:
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


# --- several in one folder ---------------------------------------------------------------------
def _series(directory: Path) -> list[tuple[Path, Manifest | CheckpointError]]:
    """The checkpoints in a directory, oldest first: the manifest of each, or what is wrong with it.

    Raises:
        NewerFormatError: this version cannot tell whether one of them is complete.
    """
    if not directory.is_dir():
        return []
    names = {m["name"] if (m := LEFTOVER.fullmatch(p.name)) else p.name for p in directory.iterdir() if p.is_dir()}
    found: list[tuple[Path, Manifest | CheckpointError]] = []
    for path in (directory / name for name in sorted(names)):
        if not any((p / MANIFEST).is_file() for p in (path, *leftovers(path))):
            continue
        try:
            at = resolve(path)
            manifest = parse(at / MANIFEST)
            check_sizes(at, manifest)
            found.append((path, manifest))
        except NewerFormatError:
            raise
        except CheckpointError as error:
            found.append((path, error))
    numbered = [re.fullmatch(r"(.*?)(\d+)", path.name) for path, _ in found]
    if all(numbered) and len({m[1] for m in numbered if m}) == 1:
        found.sort(key=lambda item: int(re.findall(r"\d+$", item[0].name)[0]))
    else:
        found.sort(key=lambda item: _time(*item))
    return found


def _time(path: Path, about: Manifest | CheckpointError) -> float:
    return about.saved_at if isinstance(about, Manifest) else resolve(path).stat().st_mtime


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in ``directory``: by number if all are named alike, else by time.

    Complete means: the manifest is whole, and all files are there in their full length. A newer one that is not is
    passed over with a warning that names it. Let one rank call it and tell the others, or give ``directory/latest``
    wherever a checkpoint is read.

    Raises:
        CheckpointError: there are checkpoints, and none of them is complete; or one is of a newer format.
    """
    bad: list[CheckpointError] = []
    for path, about in reversed(_series(Path(directory))):
        if isinstance(about, Manifest):
            for error in bad:
                warnings.warn(f"{error.where}: {error.what}; the newest complete one is {path}", stacklevel=2)
            return path
        bad.append(about)
    if bad:
        raise CheckpointError(
            f"none of the checkpoints there is complete; the newest: {bad[0].what}",
            where=str(bad[0].where),
            fix="restore one from a copy, or move the folder away to begin anew",
        )
    return None


def next_path(directory: str | os.PathLike[str], prefix: str = "checkpoint") -> Path:
    """``directory/<prefix>_<n>``, n one more than the largest there is; 0 in a new directory."""
    root = Path(directory)
    names = [p.name for p in root.iterdir()] if root.is_dir() else []
    used = [int(m[1]) for name in names if (m := re.fullmatch(rf"{re.escape(prefix)}_(\d+)", name))]
    return root / f"{prefix}_{max(used, default=-1) + 1}"


def prune(directory: str | os.PathLike[str], total_limit: int, prefix: str = "checkpoint") -> list[Path]:
    """Delete the oldest ``<prefix>_<n>`` until ``total_limit`` complete ones are left. Collective.

    The newest complete one always stays. Directories that are not complete checkpoints do not count and are not
    touched.

    Returns:
        What was deleted, on rank 0.

    Raises:
        CheckpointError: ``total_limit`` is less than 1.
    """
    check_limit(total_limit)
    gone: list[Path] = []
    root = Path(directory)
    with CollectiveBlock(f"deleting old checkpoints in {root}", slow=True):
        if World.current().rank == 0:
            gone = delete_oldest(root, total_limit, prefix)
    return gone


def check_limit(total_limit: int | None) -> None:
    if total_limit is not None and total_limit < 1:
        raise CheckpointError(f"total_limit={total_limit} would delete every checkpoint", fix="give 1 or more")


def delete_oldest(root: Path, total_limit: int, prefix: str = "checkpoint") -> list[Path]:
    """What :func:`prune` does on rank 0."""
    gone: list[Path] = []
    whole = [path for path, about in _series(root) if isinstance(about, Manifest)]
    named = [path for path in whole if re.fullmatch(rf"{re.escape(prefix)}_\d+", path.name)]
    named.sort(key=lambda p: int(p.name.rpartition("_")[2]))
    for path in named[:-total_limit]:
        if path.exists():  # a kill while deleting must not leave half a checkpoint under its name
            path.rename(path.with_name(f"{path.name}.old-{uuid.uuid4().hex[:8]}"))
        for left in list(leftovers(path)):
            discard(left)
        gone.append(path)
    return gone


# --- is it there, and whole? --------------------------------------------------------------------
def verify(directory: str | os.PathLike[str], *, progress: bool = True) -> Manifest:
    """Read every file of a checkpoint against the manifest. Collective: each rank reads a part of the files.

    Args:
        directory: a checkpoint, or ``folder/latest``.
        progress: show a bar on rank 0, if it has a terminal and this takes longer than a second.

    Returns:
        The manifest.

    Raises:
        CheckpointError: on every rank, naming the first file that is missing, cut off or changed.

    Cost: reads the whole checkpoint once, over all ranks together.
    """
    return locate_verified(directory, progress)[1]


def locate_verified(directory: str | os.PathLike[str], progress: bool = True) -> tuple[Path, Manifest]:
    """:func:`locate`, where every byte is as it was written. Collective: each rank reads a part."""
    path, manifest = locate(directory)
    entries = entries_at(path, manifest.files)
    mine = _share_of(entries)
    total, doing = GRAIN * sum(map(len, mine.values())), f"reading checkpoint {path}"
    with Progress("checking", total, progress) as bar, CollectiveBlock(doing, slow=True):
        StorageReader(entries, bar.add).read(also=mine)
    return path, manifest


def find(directory: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint: what is given, or what ``folder/latest`` stands for. Collective: rank 0 looks.

    Raises:
        CheckpointError: on every rank: there is none to be the latest.
    """
    return Path(by_first(directory, resolve_latest))


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """:func:`latest` as a collective: the newest complete checkpoint in a folder, or ``None``. Rank 0 looks.

    Raises:
        CheckpointError: on every rank: there are checkpoints, and none of them is complete.
    """
    chosen = by_first(folder, lambda path: latest(path) or "")
    return Path(chosen) if chosen else None


def by_first(directory: str | os.PathLike[str], look: Callable[[Path], Path | str]) -> str:
    """What rank 0 finds, on every rank. Collective."""
    given = Path(os.path.realpath(directory))
    with CollectiveBlock(f"reading checkpoint {given}") as ranks:
        if World.current().rank == 0:
            ranks.mine = str(look(given)).encode()
    return ranks.gathered[0].decode()


def locate(directory: str | os.PathLike[str]) -> tuple[Path, Manifest]:
    """Where the files of a checkpoint are, and its manifest. Collective. Files are there and as long as they should be.

    Raises:
        CheckpointError: on every rank: it is missing, incomplete, not a checkpoint, or of a newer format.
    """
    path = Path(by_first(directory, resolve))
    with CollectiveBlock(f"reading checkpoint {path}"):
        manifest = present(path)
    return path, manifest


def present(path: Path) -> Manifest:
    """The manifest of a checkpoint that rank 0 has found. Any rank may call it alone."""
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            "rank 0 sees this checkpoint, this rank does not",
            where=str(path),
            fix="keep checkpoints on a file system that all hosts share",
        )
    manifest = parse(path / MANIFEST)
    check_sizes(path, manifest)
    return manifest


def every_grain(entries: Mapping[Path, FileEntry]) -> dict[Path, set[int]]:
    """All that have a checksum, by file."""
    return {file: set(range(len(entry.crc32))) for file, entry in entries.items()}


def read_whole(path: Path, files: Mapping[str, FileEntry], names: Sequence[str]) -> dict[str, bytes]:
    """The contents of some small files of a checkpoint, compared with their checksums. Any rank may call it alone.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    if missing := [name for name in names if name not in files]:
        raise damaged(path / missing[0], "the file is missing")
    into = {name: torch.empty(files[name].size, dtype=torch.uint8) for name in names}
    StorageReader(entries_at(path, files)).read(Run(path / n, 0, torch.uint8, tensor) for n, tensor in into.items())
    return {name: tensor.numpy().tobytes() for name, tensor in into.items()}


def _share_of(entries: Mapping[Path, FileEntry]) -> dict[Path, set[int]]:
    """This rank's part of all grains."""
    world = World.current()
    every = [(file, index) for file, indices in sorted(every_grain(entries).items()) for index in sorted(indices)]
    out: dict[Path, set[int]] = {}
    for file, index in every[len(every) * world.rank // world.size : len(every) * (world.rank + 1) // world.size]:
        out.setdefault(file, set()).add(index)
    return out
