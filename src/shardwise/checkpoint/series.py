"""Several checkpoints in one directory: names, the newest one, and deleting old ones."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from shardwise.checkpoint.files import LEFTOVER, MANIFEST, Manifest, discard, leftovers, read_manifest
from shardwise.checkpoint.ranks import Together
from shardwise.comm import World
from shardwise.errors import CheckpointError


def _complete(directory: Path, skip_bad: bool) -> list[Path]:
    """The complete checkpoints in a directory, oldest first.

    Raises:
        CheckpointError: without ``skip_bad``, one has a manifest that cannot be read.
    """
    if not directory.is_dir():
        return []
    names = {m["name"] if (m := LEFTOVER.fullmatch(p.name)) else p.name for p in directory.iterdir() if p.is_dir()}
    found: list[tuple[Path, Manifest]] = []
    for path in (directory / name for name in sorted(names)):
        if not any((p / MANIFEST).is_file() for p in (path, *leftovers(path))):
            continue
        try:
            found.append((path, read_manifest(path)))
        except CheckpointError:
            if not skip_bad:
                raise
    numbered = [re.fullmatch(r"(.*?)(\d+)", path.name) for path, _ in found]
    if all(numbered) and len({m[1] for m in numbered if m}) == 1:
        found.sort(key=lambda item: int(re.findall(r"\d+$", item[0].name)[0]))
    else:
        found.sort(key=lambda item: item[1].saved_at)
    return [path for path, _ in found]


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in ``directory``: by number if all are named alike, else by time.

    Reads manifests only. Let one rank call it and tell the others, or all of them between two saves.

    Raises:
        CheckpointError: a manifest in there is damaged or of a newer format. Going on from an older checkpoint
            must be somebody's decision.
    """
    found = _complete(Path(directory), skip_bad=False)
    return found[-1] if found else None


def next_path(directory: str | os.PathLike[str], prefix: str = "checkpoint") -> Path:
    """``directory/<prefix>_<n>``, n one more than the largest there is; 0 in a new directory."""
    root = Path(directory)
    names = [p.name for p in root.iterdir()] if root.is_dir() else []
    used = [int(m[1]) for name in names if (m := re.fullmatch(rf"{re.escape(prefix)}_(\d+)", name))]
    return root / f"{prefix}_{max(used, default=-1) + 1}"


def prune(directory: str | os.PathLike[str], total_limit: int, prefix: str = "checkpoint") -> list[Path]:
    """Delete the oldest ``<prefix>_<n>`` until ``total_limit`` complete ones are left. Collective.

    The newest complete one always stays. Directories that are not complete checkpoints are not touched.

    Returns:
        What was deleted, on rank 0.

    Raises:
        CheckpointError: ``total_limit`` is less than 1.
    """
    if total_limit < 1:
        raise CheckpointError(f"total_limit={total_limit} would delete every checkpoint", fix="give 1 or more")
    gone: list[Path] = []
    root = Path(directory)
    with Together(f"deleting old checkpoints in {root}", slow=True):
        if World.current().rank == 0:
            named = [p for p in _complete(root, skip_bad=True) if re.fullmatch(rf"{re.escape(prefix)}_\d+", p.name)]
            named.sort(key=lambda p: int(p.name.rpartition("_")[2]))
            for path in named[:-total_limit]:
                if path.exists():  # a kill while deleting must not leave half a checkpoint under its name
                    path.rename(path.with_name(f"{path.name}.old-{uuid.uuid4().hex[:8]}"))
                for left in list(leftovers(path)):
                    discard(left)
                gone.append(path)
    return gone
