"""Memory of this host, as far as this process may use it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_CONTAINER = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


class HostMemory(NamedTuple):
    """Bytes."""

    free: int
    total: int


def memory() -> HostMemory | None:
    """What there is, and what is free (or cached, and given back when asked for); ``None``: the system does not say.

    The limits of a container count.
    """
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):
        return None
    free = _table(Path("/proc/meminfo")).get("MemAvailable", free >> 10) << 10
    for limit_file, used_file in _CONTAINER:
        base = Path("/sys/fs/cgroup")
        limit, used = _number(base / limit_file), _number(base / used_file)
        if limit is not None and limit < total:
            cached = _table((base / limit_file).parent / "memory.stat").get("inactive_file", 0)
            free, total = min(free, max(0, limit - (used or 0) + cached)), limit
            break
    return HostMemory(free, total)


def resident() -> int | None:
    """Bytes of this process that are in memory now; ``None``: the system does not say. Costs 10 microseconds."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        words = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
