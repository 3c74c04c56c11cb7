"""Memory of this host that a process may still take."""

from __future__ import annotations

import os
from pathlib import Path

_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Bytes that can be taken without swapping, within the limit of the container if there is one; 0 if nobody says."""
    free = _of_system()
    for limit, used in _GROUPS:
        most, now = _number(limit), _number(used)
        if most is not None and now is not None:
            cached = _field(Path(limit).with_name("memory.stat"), "inactive_file", " ")
            free = min(free, max(0, most - now + (cached or 0)))
    return free


def _of_system() -> int:
    told = _field(Path("/proc/meminfo"), "MemAvailable", ":")
    if told is not None:
        return told * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        pass
    try:  # systems that do not tell what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str, after: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, found, value = line.partition(after)
        if found and key == name:
            return int(value.split()[0])
    return None
