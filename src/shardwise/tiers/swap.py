"""The swap folder of one rank: private, unique, gone when the process is, and left by nobody.

The process holds a lock (``flock``) on a file in its folder. The kernel drops that lock when the process ends, however
it ends, so a folder whose lock is free belongs to nobody, and the next start removes it. Files of the store have no
name (they are unlinked as soon as they are open), so their bytes are free at once even after a kill.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import stat
import sys
import tempfile
import time
import weakref

from shardwise.errors import OffloadError
from shardwise.tiers.disk_errors import explain
from shardwise.tiers.mounts import in_memory, is_local

if sys.platform != "win32":
    import fcntl

LOCK = "owner.json"
FOLDER = re.compile(r"shardwise-swap-r\d+-[0-9a-f]{16}")
FILE = re.compile(r"extent-\d+\.swap")
MARK = "shardwise swap folder"
ATTEMPTS = 20
_log = logging.getLogger("shardwise")


def default_folder() -> str:
    """Where to swap if nothing was said: the first of ``$TMPDIR`` (or ``/tmp``), ``/var/tmp`` and the current folder
    that lies on a disk.

    Raises:
        OffloadError: all of them lie in memory or cannot be written to.
    """
    tried = [tempfile.gettempdir(), "/var/tmp", os.getcwd()]
    for folder in tried:
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK) and not in_memory(folder):
            return folder
    raise OffloadError(
        f"no folder on a disk was found to swap to (tried {', '.join(tried)})", fix="give nvme_path, a folder on a disk"
    )


class SwapFolder:
    """A new folder below ``base``, mode 0700, that is this process's alone.

    Folders of runs that were killed are removed on the way; see :func:`remove_stale`. It removes itself when
    closed, when it is no longer referenced, and when Python exits, also by an exception or ``sys.exit``. A process
    that a signal ends at once leaves an empty folder for the next start.

    Args:
        base: an existing folder on the disk to use; default: :func:`default_folder`. It is not created: a path that
            is missing is most often a disk that is not mounted.
        rank: for the folder's name, and for reports.

    Attributes:
        path: the folder.
        removed: left-over folders that this start removed.

    Raises:
        OffloadError: ``base`` is missing, no folder, full or not writable.
    """

    def __init__(self, base: str | os.PathLike[str] | None = None, *, rank: int = 0) -> None:
        if sys.platform == "win32":
            raise OffloadError("swapping to a disk does not work on Windows", fix="use home cpu, or Linux")
        self.base = os.path.abspath(default_folder() if base is None else base)
        self.rank = rank
        where = f"rank {rank}, nvme_path {self.base}"
        try:
            os.listdir(self.base)  # says what is wrong with the folder before anything is made in it
            self.removed = remove_stale(self.base)
            self.path, lock = _create(self.base, rank)
        except OSError as error:
            if isinstance(error, OffloadError):
                raise
            raise explain(error, "making a swap folder", where, self.base) from error
        self._finalizer = weakref.finalize(self, _remove_own, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove the folder. Files in it that Shardwise did not make stay, and then the folder too."""
        self._finalizer()


def remove_stale(base: str | os.PathLike[str]) -> list[str]:
    """Remove swap folders below ``base`` whose process has ended.

    A folder is removed only if its name, its owner, its lock file and everything in it are what Shardwise makes, this
    user owns it, and nobody holds its lock. On a network file system it must be of this host as well, because not all
    of them lock across hosts.

    Returns:
        The folders that were removed.
    """
    removed = []
    for entry in sorted(os.scandir(base), key=lambda e: e.name):
        if FOLDER.fullmatch(entry.name) is None or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            if _remove_if_stale(entry.path, is_local(base)):
                removed.append(entry.path)
        except OSError as error:
            # Another rank may be removing it as well; what stays is looked at again by the next start.
            _log.debug("swap folder %s was left where it is: %s", entry.path, error)
    if removed:
        _log.info("removed %d swap folders of runs that were killed: %s", len(removed), ", ".join(removed))
    return removed


def _create(base: str, rank: int) -> tuple[str, int]:
    """A new folder, and the descriptor that holds its lock. Another process's :func:`remove_stale` may see the folder
    before it is locked and take it for a left-over: then the next try makes another one."""
    for _ in range(ATTEMPTS):
        path = os.path.join(base, f"shardwise-swap-r{rank}-{secrets.token_hex(8)}")
        os.mkdir(path, 0o700)
        try:
            fd = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        except OSError:
            os.rmdir(path)
            raise
        if not _locked(fd) or not _still_there(fd, os.path.join(path, LOCK)):
            os.close(fd)
            continue
        owner = {"what": MARK, "host": socket.gethostname(), "pid": os.getpid(), "rank": rank}
        try:
            os.write(fd, json.dumps({**owner, "started": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
        except OSError:
            _remove_own(path, fd, os.getpid())
            raise
        return path, fd
    raise OffloadError(
        f"{ATTEMPTS} new swap folders were removed by somebody else at once", where=base, fix="give another nvme_path"
    )


def _locked(fd: int) -> bool:
    """Take the lock. ``True`` also where the file system has none: there nobody can take the folder for a left-over."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.info("no locks on this file system (%s): left-over swap folders are not found there", error)
    return True


def _still_there(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_if_stale(path: str, local: bool) -> bool:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(folder).st_uid != os.geteuid():
            return False
        names = os.listdir(folder)
        if not names:  # killed before it had a lock file; if it lives, it makes another folder
            os.rmdir(path)
            return True
        if any(name != LOCK and FILE.fullmatch(name) is None for name in names) or LOCK not in names:
            return False
        lock = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(lock).st_mode) or not _is_ours(os.read(lock, 4096), local):
                return False
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its process lives, or if there are no locks
            _empty(path, folder)
            return True
        finally:
            os.close(lock)
    finally:
        os.close(folder)


def _is_ours(text: bytes, local: bool) -> bool:
    if not text:  # killed before it could write
        return local
    try:
        owner = json.loads(text)
    except ValueError:
        return False
    if not isinstance(owner, dict) or owner.get("what") != MARK:
        return False
    return local or owner.get("host") == socket.gethostname()


def _empty(path: str, folder: int) -> None:
    """Remove what is Shardwise's in a folder, and the folder if nothing else is in it."""
    for name in os.listdir(folder):
        if FILE.fullmatch(name) is not None:
            os.unlink(name, dir_fd=folder)
    if os.listdir(folder) == [LOCK]:
        os.unlink(LOCK, dir_fd=folder)
        os.rmdir(path)


def _remove_own(path: str, lock: int, pid: int) -> None:
    """Remove this process's folder; whoever removed it before us, or put something in it, is not an error."""
    if os.getpid() != pid:  # a forked child, a dataloader's worker for one, holds a copy only
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _empty(path, folder)
        finally:
            os.close(folder)
    except OSError as error:
        _log.debug("swap folder %s was left where it is: %s", path, error)
    finally:
        os.close(lock)
