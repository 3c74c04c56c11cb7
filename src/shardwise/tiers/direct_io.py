"""Direct I/O: files opened past the page cache where their file system knows how, and moved to and from memory in full.

The system wants whole blocks at aligned addresses; callers bring those, or their files go through the page cache.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwise.tiers.aligned import ALIGN
from shardwise.tiers.mounts import in_memory

if sys.platform != "win32":
    import fcntl

DIRECT = getattr(os, "O_DIRECT", 0)
"""The flag of ``open``; 0 where the system has no direct I/O."""
UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
"""What file systems answer that have no direct I/O, or none for the request at hand."""


def open_direct(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> tuple[int, bool]:
    """A file descriptor, and whether it goes past the page cache."""
    with naming(path):
        if DIRECT and not in_memory(os.path.dirname(path)):
            try:
                return os.open(path, flags | DIRECT, mode), True
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                flags &= ~os.O_EXCL  # some make the file before they say no
        return os.open(path, flags, mode), False


def read_full(fd: int, view: memoryview, offset: int, at_least: int | None = None) -> int:
    """Read into all of ``view``, or until ``at_least`` bytes are there, or the file ends; returns how many."""
    return _move(_preadv, fd, view, offset, at_least)


def write_full(fd: int, view: memoryview, offset: int) -> int:
    """Write all of ``view``; returns how many bytes the disk took, fewer if it takes no more."""
    return _move(os.pwrite, fd, view, offset, None)


def _preadv(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)


def _move(
    call: Callable[[int, memoryview, int], int], fd: int, view: memoryview, offset: int, at_least: int | None
) -> int:
    done, enough = 0, view.nbytes if at_least is None else at_least
    while done < enough:
        direct = is_direct(fd)  # asked before: another thread may be about to change it
        try:
            n = call(fd, view[done:], offset + done)
        except OSError as error:
            if error.errno not in UNSUPPORTED or not direct:
                raise
            _leave_direct(fd)
            continue
        if n == 0:
            break
        done += n
        if direct and done % ALIGN and done < enough:  # the file's end, or a disk all but full: no block begins here
            _leave_direct(fd)
    return done


def is_direct(fd: int) -> bool:
    """Whether a file goes past the page cache."""
    return bool(DIRECT and fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT)


def _leave_direct(fd: int) -> None:
    """Let a file go through the page cache from now on."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~DIRECT)


class naming:
    """An ``OSError`` inside says which file it was about."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            error.filename = str(Path(self.path))
