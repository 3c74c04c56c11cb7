"""Is a checkpoint there, and whole?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from shardwise.checkpoint.files import GRAIN, MANIFEST, FileEntry, Manifest, check_sizes, damaged, named, parse, resolve
from shardwise.checkpoint.progress import Progress
from shardwise.checkpoint.ranks import Together
from shardwise.checkpoint.readback import Readback, Run
from shardwise.checkpoint.series import latest
from shardwise.comm import World
from shardwise.errors import CheckpointError


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
    return whole(directory, progress)[1]


def whole(directory: str | os.PathLike[str], progress: bool = True) -> tuple[Path, Manifest]:
    """:func:`found`, where every byte is as it was written. Collective: each rank reads a part."""
    path, manifest = found(directory)
    mine = _share_of(manifest.files)
    total, doing = GRAIN * sum(map(len, mine.values())), f"reading checkpoint {path}"
    with Progress("checking", total, progress) as bar, Together(doing, slow=True):
        Readback(path, manifest.files, bar).read(also=mine)
    return path, manifest


def find(directory: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint: what is given, or what ``folder/latest`` stands for. Collective: rank 0 looks.

    Raises:
        CheckpointError: on every rank: there is none to be the latest.
    """
    return Path(_by_first(directory, named))


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """:func:`latest` as a collective: the newest complete checkpoint in a folder, or ``None``. Rank 0 looks.

    Raises:
        CheckpointError: on every rank: there are checkpoints, and none of them is complete.
    """
    chosen = _by_first(folder, lambda path: latest(path) or "")
    return Path(chosen) if chosen else None


def _by_first(directory: str | os.PathLike[str], look: Callable[[Path], Path | str]) -> str:
    given = Path(os.path.realpath(directory))
    with Together(f"reading checkpoint {given}") as ranks:
        if World.current().rank == 0:
            ranks.mine = str(look(given)).encode()
    return ranks.told[0].decode()


def found(directory: str | os.PathLike[str]) -> tuple[Path, Manifest]:
    """Where the files of a checkpoint are, and its manifest. Collective. Files are there and as long as they should be.

    Raises:
        CheckpointError: on every rank: it is missing, incomplete, not a checkpoint, or of a newer format.
    """
    path = Path(_by_first(directory, resolve))
    with Together(f"reading checkpoint {path}"):
        if not (path / MANIFEST).is_file():
            raise CheckpointError(
                "rank 0 sees this checkpoint, this rank does not",
                where=str(path),
                fix="keep checkpoints on a file system that all hosts share",
            )
        manifest = parse(path / MANIFEST)
        check_sizes(path, manifest)
    return path, manifest


def every_grain(files: Mapping[str, FileEntry]) -> dict[str, set[int]]:
    """All that have a checksum, by file."""
    return {name: set(range(len(entry.crc32))) for name, entry in files.items()}


def read_whole(path: Path, files: Mapping[str, FileEntry], names: Sequence[str]) -> dict[str, bytes]:
    """The contents of some small files of a checkpoint, compared with their checksums. Any rank may call it alone.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    if missing := [name for name in names if name not in files]:
        raise damaged(path / missing[0], "the file is missing")
    into = {name: torch.empty(files[name].size, dtype=torch.uint8) for name in names}
    Readback(path, files).read(Run(name, 0, torch.uint8, tensor) for name, tensor in into.items())
    return {name: tensor.numpy().tobytes() for name, tensor in into.items()}


def _share_of(files: Mapping[str, FileEntry]) -> dict[str, set[int]]:
    """This rank's part of all grains."""
    world = World.current()
    every = [(name, index) for name, indices in sorted(every_grain(files).items()) for index in sorted(indices)]
    out: dict[str, set[int]] = {}
    for name, index in every[len(every) * world.rank // world.size : len(every) * (world.rank + 1) // world.size]:
        out.setdefault(name, set()).add(index)
    return out
