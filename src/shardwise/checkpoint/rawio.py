"""Files opened past the page cache, moved to and from memory in full, with the file's name in every error."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwise.tiers.aligned import ALIGN
from shardwise.tiers.mounts import in_memory


def open_file(path: Path, flags: int) -> int:
    """A file descriptor, past the page cache where the file system knows how."""
    direct = getattr(os, "O_DIRECT", 0)
    with named(path):
        if direct and not in_memory(path.parent):
            try:
                return os.open(path, flags | direct, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                flags &= ~os.O_EXCL  # some make the file before they say no
        return os.open(path, flags, 0o666)


def read_at(fd: int, view: memoryview, offset: int, path: Path, at_least: int = -1) -> int:
    """Read into all of ``view``, or until ``at_least`` bytes are there, or the file ends; returns how many."""
    return _move(_preadv, fd, view, offset, path, at_least)


def write_at(fd: int, view: memoryview, offset: int, path: Path) -> int:
    """Write all of ``view``."""
    return _move(os.pwrite, fd, view, offset, path, -1)


def _preadv(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)


def _move(
    call: Callable[[int, memoryview, int], int], fd: int, view: memoryview, offset: int, path: Path, at_least: int
) -> int:
    done, enough = 0, view.nbytes if at_least < 0 else at_least
    with named(path):
        while done < enough:
            try:
                n = call(fd, view[done:], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and _no_longer_direct(fd):
                    continue
                raise
            if n == 0:
                break
            done += n
            if done % ALIGN:  # the end of a file, or a disk all but full: the rest does not begin at a disk's block
                _no_longer_direct(fd)
    return done


def _no_longer_direct(fd: int) -> bool:
    """Let a file go through the page cache from now on; ``False`` if it does already."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & direct:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~direct)
    return True


class named:
    """An ``OSError`` inside says which file it was about."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            error.filename = str(self.path)
