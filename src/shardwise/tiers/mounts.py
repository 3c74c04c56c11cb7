"""What kind of file system a folder lies on."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
# Where the kernel that drops a lock is the only one that grants it.
LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "overlay", "apfs"}) | IN_MEMORY


def file_system(folder: str | os.PathLike[str]) -> str:
    """The type of the file system that holds ``folder`` (``ext4``, ``nfs``, ...); empty where it cannot be told."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:  # no Linux
        return ""
    path, best, found = os.path.realpath(folder), -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of two mounts at one place the later one counts
            best, found = len(point), right.split()[0]
    return found


def in_memory(folder: str | os.PathLike[str]) -> bool:
    """Whether what is written to ``folder`` stays in memory."""
    return file_system(folder) in IN_MEMORY


def is_local(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` is known to be this machine's alone."""
    return file_system(folder) in LOCAL
