"""Writing a checkpoint whose contents are known: the copy, the files, the index, the name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardwise.checkpoint import files, safe, series
from shardwise.checkpoint.blocks import BlockFile, Buffers, Crew, checksum
from shardwise.checkpoint.files import FileEntry, Manifest
from shardwise.checkpoint.progress import Progress
from shardwise.checkpoint.ranks import Share, Together
from shardwise.checkpoint.storage import METADATA, Copy, Plans
from shardwise.comm import World
from shardwise.errors import CheckpointError


class Files:
    """The files that this rank writes."""

    def __init__(self, buffers: Buffers, crew: Crew | None, plans: Plans) -> None:
        self.buffers, self.crew, self.plans = buffers, crew, plans
        self.folder = Path()
        self.progress: Progress | None = None
        self.by_name: dict[str, BlockFile] = {}

    def new(self, name: str) -> BlockFile:
        file = self.by_name[name] = BlockFile(self.folder / name, self.buffers, self.crew, self.progress)
        return file


@dataclass
class Save:
    """A checkpoint that is about to be written.

    Args:
        files: this rank's.
        manifest: without the files.
        small: names and contents of this rank's files of small state.
        copy: of the tensors.
        changes_in_step: beginnings of the names of tensors that nothing but an optimizer's step changes.
    """

    world: World
    files: Files
    final: Path
    manifest: Manifest
    small: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]] | None
    files_from: Callable[[Path], None] | None
    copy: Copy
    changes_in_step: tuple[str, ...]
    total_limit: int | None

    @property
    def doing(self) -> str:
        return f"writing checkpoint {self.final}"

    def begin_copy(self) -> None:
        """Copy what may change when the caller goes on. Collective."""
        with _removed_if_it_fails(self.world, self.files, None), Together(self.doing, slow=True):
            self._begin_copy(lambda name: name.startswith(self.changes_in_step))

    def _begin_copy(self, later: Callable[[str], bool]) -> None:
        folder = self.files.folder
        if not folder.is_dir():
            raise CheckpointError(
                "rank 0 has made this directory, and this rank does not see it",
                where=str(folder),
                fix="save to a file system that all hosts share",
            )
        assert self.small is not None
        for name, value in self.small():
            file = self.files.new(name)
            file.write(safe.dumps(value))
            file.end()
        self.small = None  # it knows what belongs to the caller
        if self.files_from is not None:
            self.files_from(folder)
        self.copy.begin(later)

    def in_background(self, share: Share, copied: Callable[[], None]) -> None:
        crew = Crew()
        try:
            self.finish(crew, share, copied)
        finally:
            crew.stop()

    def finish(self, crew: Crew, share: Share, copied: Callable[[], None]) -> None:
        """Have everything on the disk, on all ranks, and let the directory take its name. Collective.

        Args:
            copied: is called when this rank's copy has ended, well or not.
        """
        with _removed_if_it_fails(self.world, self.files, crew):
            with Together(self.doing, slow=True, by=share) as ranks:
                try:
                    if self.small is not None:
                        self._begin_copy(lambda _: False)
                    self.copy.end()
                finally:
                    copied()
                for file in self.files.by_name.values():  # not before: an update waits for the copy
                    file.give_to(crew)
                ranks.mine = pickle.dumps(self.copy.results)
            with Together(self.doing, slow=True, by=share) as done:
                if self.world.rank == 0:
                    file = self.files.new(METADATA)
                    file.write(self.copy.index(ranks.told))
                    file.end()
                    file.give_to(crew)
                crew.end()
                written = {name: file.close() for name, file in self.files.by_name.items()}
                done.mine = json.dumps({name: [e.size, e.crc32] for name, e in written.items()}).encode()
            with Together(self.doing, slow=True, by=share):
                if self.world.rank == 0:
                    self._publish({n: FileEntry(*entry) for data in done.told for n, entry in json.loads(data).items()})

    def _publish(self, table: dict[str, FileEntry]) -> None:
        folder = self.files.folder
        present = files.listing(folder)
        if missing := sorted(table.keys() - present):
            raise CheckpointError(
                f"rank 0 does not see '{missing[0]}', which another rank has written",
                where=str(folder),
                fix="save to a file system that all hosts share",
            )
        for name in sorted(present - table.keys()):  # from ``files_from``
            table[name] = checksum(folder / name)
        files.commit(folder, self.final, replace(self.manifest, files=dict(sorted(table.items()))))
        if self.total_limit is not None:
            series.delete_oldest(self.final.parent, self.total_limit)


@contextmanager
def _removed_if_it_fails(world: World, out: Files, crew: Crew | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if crew is not None:
            crew.drop()
        for file in out.by_name.values():
            file.abandon()
        if world.rank == 0:
            shutil.rmtree(out.folder, ignore_errors=True)
        raise
