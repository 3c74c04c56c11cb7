"""The system's error numbers, in words: what went wrong on a disk and what to do about it."""

from __future__ import annotations

import errno
import os
import sys

from shardwise.errors import OffloadError
from shardwise.sizes import format_bytes


def free_bytes(folder: str) -> int:
    """What an ordinary user may still write below ``folder``; where a file system does not tell, no limit."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize


_SAID = {
    errno.ENOENT: ("the folder does not exist", "create it, mount its disk, or give another nvme_path"),
    errno.ENOTDIR: ("this is not a folder", "give a folder as nvme_path"),
    errno.EACCES: ("the folder is not writable for this user", "change its owner or mode, or give another nvme_path"),
    errno.EPERM: ("the folder is not writable for this user", "change its owner or mode, or give another nvme_path"),
    errno.EROFS: ("the file system is read-only", "mount it writable, or give another nvme_path"),
    errno.ENOSPC: ("the disk is full", "free space there, or give an nvme_path on a larger disk"),
    errno.EDQUOT: ("this user's disk quota is used up", "free space there, or give an nvme_path on another disk"),
    errno.EFBIG: ("the file would exceed the largest allowed size", "raise `ulimit -f`, or use more ranks or units"),
    errno.EMFILE: ("this process has too many open files", "raise `ulimit -n`; every unit keeps one file open"),
    errno.ENFILE: ("the system has too many open files", "close other programs, or raise fs.file-max"),
    errno.EIO: ("the disk reported an I/O error", "look at the system's log; the disk may be failing"),
    errno.EINVAL: ("the file system refused the request", "ask for buffered I/O (direct=False)"),
    errno.ESTALE: ("the network file system lost the file", "use a local disk as nvme_path"),
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: OSError, doing: str, where: str, folder: str, needed: int = 0) -> OffloadError:
    """The error to raise for an ``OSError`` met while ``doing`` something.

    Args:
        doing: what was under way, ``writing 4096 bytes at offset 0``.
        where: rank, extent, file.
        folder: the folder, to ask how much is free there.
        needed: bytes that were wanted, if known.
    """
    code = error.errno or 0
    what, fix = _SAID.get(code, (error.strerror or str(error), "look at the system's log, or give another nvme_path"))
    if code in _FULL:
        if needed:
            what += f": {format_bytes(needed)} needed"
        try:
            what += f", {format_bytes(free_bytes(folder))} free"
        except OSError:  # the folder is gone too; what is known is said
            what += f" ({folder} cannot be asked how much is free)"
    found = OffloadError(f"{what} ({doing})", where=where, fix=fix)
    found.errno = code
    return found


def again(error: OffloadError) -> OffloadError:
    """The same error anew: one object raised in several places would collect their tracebacks."""
    copy = OffloadError(error.what, where=error.where, fix=error.fix)
    copy.errno, copy.__cause__ = error.errno, error.__cause__
    return copy
