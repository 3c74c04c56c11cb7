"""Meters that treat every library alike: live allocator bytes, and bytes a process writes to its connections.

Live bytes are asked of the C allocator, below every library. The allocator events of ``torch.profiler`` would be
the obvious source, but they miss what communication threads free, and so charge a library for buffers that
are long gone (tens of MB per rank for FSDP over gloo). glibc keeps large blocks apart as mappings of their own and
counts them exactly, whichever thread makes or frees them.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

LARGE = 64 << 10  # blocks from this size on are counted: tensors, but hardly a Python object
_PERIOD = 1e-4
_M_MMAP_THRESHOLD, _M_MMAP_MAX = -3, -4


_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def count_large_blocks() -> Callable[[], int]:
    """Have glibc map every large block from now on; returns how to read the bytes they occupy.

    Raises:
        RuntimeError: the C library is not glibc 2.33 or later.
    """
    library = ctypes.CDLL(None)
    try:
        library.mallinfo2.restype = _MallInfo
    except AttributeError:
        raise RuntimeError("live memory is measured through glibc's mallinfo2 (2.33 or later)") from None
    library.mallopt(_M_MMAP_THRESHOLD, LARGE)
    library.mallopt(_M_MMAP_MAX, 1 << 20)
    return lambda: library.mallinfo2().hblkhd


class MemoryMeter:
    """Bytes of large blocks beyond those that lived when the meter was made.

    Attributes:
        peak: most bytes seen inside a ``with`` block, looked at every 0.1 ms.
        held: bytes at the end of the last ``with`` block.
    """

    def __init__(self) -> None:
        gc.collect()
        self._read = count_large_blocks()
        self._base = self._read()
        self.peak = self.held = 0

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, self._read() - self._base)
            time.sleep(_PERIOD)

    def __enter__(self) -> MemoryMeter:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        gc.collect()
        self.held = self._read() - self._base


def check_meter() -> None:
    """Measure a known case: 20 MB kept, 100 MB made here and freed by another thread.

    Raises:
        RuntimeError: the meter is off by more than a page per block.
    """
    meter = MemoryMeter()
    box = [torch.empty(25_000_000)]
    kept = torch.empty(5_000_000)
    with meter:
        time.sleep(0.02)
        other = threading.Thread(target=box.clear)
        other.start()
        other.join()
    if not 0 <= meter.peak - 120_000_000 < 50_000 or not 0 <= meter.held - kept.nbytes < 50_000:
        raise RuntimeError(f"the memory meter reads {meter.peak}, {meter.held} where 120 MB and 20 MB are true")


def written_bytes() -> int | None:
    """Bytes this process has written so far, its sockets included; ``None`` where the system does not say.

    Unlike the counters of a network interface, nobody else's traffic is in it.
    """
    return _counter("wchar")


def disk_bytes() -> tuple[int, int] | None:
    """Bytes that this process has had read from and written to disks so far; ``None`` where the system does not say."""
    read, written = _counter("read_bytes"), _counter("write_bytes")
    return None if read is None or written is None else (read, written)


def _counter(key: str) -> int | None:
    counters = Path("/proc/self/io")
    if not counters.exists():
        return None
    return next(int(line.split()[1]) for line in counters.read_text().splitlines() if line.startswith(key + ":"))


class ResidentMeter:
    """The most memory of any kind that this process has occupied, beyond what it had when the meter was made.

    Unlike :class:`MemoryMeter` it sees pages that did not come from the C allocator (host buffers for direct I/O,
    pinned memory), and freed blocks that the allocator keeps. So large blocks are mapped on their own, as there.
    """

    def __init__(self) -> None:
        gc.collect()
        count_large_blocks()
        self._base = _status("VmRSS")

    def reset(self) -> None:
        """Forget the peak: it is what is occupied now."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")

    @property
    def peak(self) -> int:
        """Bytes, since the last :meth:`reset`."""
        return _status("VmHWM") - self._base


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) << 10
