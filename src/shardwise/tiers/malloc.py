"""Memory that was freed goes back to the system.

glibc's malloc keeps freed blocks of up to 32 MiB, between blocks that are still in use. Units are made, updated and
sent to a disk one after the other, and a process grows by what malloc keeps of each, as if nothing had been sent away.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``, where that is the C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, which keeps its own counsel
        return None


def release_free_memory() -> None:
    """Whole free pages of malloc's heap. About 20 ms for a heap of 1 GiB, without the interpreter's lock."""
    trim = _trim()
    if trim is not None:
        trim(0)
