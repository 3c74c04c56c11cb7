"""Several checkpoints in one directory: names, the newest one, and deleting old ones."""

from __future__ import annotations

import os
import re
import uuid
import warnings
from pathlib import Path

from shardwise.checkpoint.files import (
    LEFTOVER,
    MANIFEST,
    Manifest,
    NewerFormatError,
    check_sizes,
    discard,
    leftovers,
    parse,
    resolve,
)
from shardwise.checkpoint.ranks import Together
from shardwise.comm import World
from shardwise.errors import CheckpointError


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
    with Together(f"deleting old checkpoints in {root}", slow=True):
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
