"""How fast the disk, the link to the device and the device are: measured in a moment, before a plan is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from shardwise import device as devices
from shardwise.errors import OffloadError
from shardwise.tiers.aligned import aligned_empty
from shardwise.tiers.stored_files import StoredFiles

DISK = 1e9
"""Bytes per second of a disk that was not measured: a plain NVMe."""
_MOMENT_S = 0.05  # for each of the measurements; there are four
_PIECE = 16 << 20
_LONG = 64  # tokens of the forward that stands for a long one
_ELEMENTS = 8 << 20


@dataclass(frozen=True)
class Rates:
    """What a forecast is made of.

    Args:
        disk: bytes per second of a sequential read, past the page cache.
        link: bytes per second from the host to the device; 0: they are the same memory.
        short, long: seconds per element of a matrix and token: of a forward of ``batch`` tokens, and of a long one.
        batch: tokens of the short one.
        measured: the disk was, and not supposed.
    """

    disk: float
    link: float
    short: float
    long: float
    batch: int
    measured: bool = True

    @classmethod
    def of(cls, values: Sequence[Any]) -> Rates:
        """From its fields in their order."""
        return cls(*values)

    def slower(self, other: Rates) -> Rates:
        """What holds for both of two ranks."""
        return Rates(
            min(self.disk, other.disk), min(self.link, other.link), max(self.short, other.short),
            max(self.long, other.long), self.batch, self.measured and other.measured,
        )  # fmt: skip


@torch.no_grad()
def measure(files: Iterable[Path], device: torch.device, dtype: torch.dtype, batch: int) -> Rates:
    """Measure. Takes a fifth of a second, and 100 MB at most.

    Args:
        files: of the weights; the longest is read from.
        device: that computes.
        dtype: that it computes in.
        batch: tokens of a short forward.
    """
    disk = _disk(files)
    link = 0.0 if device.type == "cpu" else _link(device)
    many = max(_LONG, batch)
    short, long = _matmul(device, dtype, batch), _matmul(device, dtype, many)
    return Rates(disk or DISK, link, short / batch, long / many, batch, disk is not None)


def _disk(files: Iterable[Path]) -> float | None:
    """Bytes per second; ``None``: nothing to read, or it cannot be, which whoever loads will hear of."""
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    file = max(sizes, key=lambda f: sizes[f], default=None)
    if file is None or sizes[file] < _PIECE:
        return None
    reader = StoredFiles()
    try:
        buffer = aligned_empty(_PIECE)
        pieces = range(0, sizes[file] - _PIECE + 1, _PIECE)
        reader.read(file, pieces[-1], buffer).wait()  # pages that are there, a disk that is awake
        start, done = perf_counter(), 0
        for at in pieces:
            reader.read(file, at, buffer).wait()
            done += _PIECE
            if perf_counter() - start > _MOMENT_S:
                break
        return done / (perf_counter() - start)
    except OffloadError:
        return None
    finally:
        reader.close()


def _link(device: torch.device) -> float:
    source = torch.ones(_PIECE, dtype=torch.uint8, pin_memory=devices.can_pin(device))
    target = torch.empty_like(source, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        devices.synchronize(device)

    return _PIECE / _seconds(copy)


def _matmul(device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Seconds per element of a matrix that so many tokens go through."""
    elements, width = 1 << 18, 512
    while True:
        matrix = torch.ones(elements // width, width, dtype=dtype, device=device)
        x = torch.ones(tokens, width, dtype=dtype, device=device)

        def multiply(x: torch.Tensor = x, matrix: torch.Tensor = matrix) -> None:
            torch.nn.functional.linear(x, matrix)
            devices.synchronize(device)

        taken = _seconds(multiply)
        if elements >= _ELEMENTS or 4 * taken * 3 > _MOMENT_S:
            return taken / elements
        elements *= 4


def _seconds(work: Callable[[], None]) -> float:
    """The least of some times, the first apart."""
    begun = perf_counter()
    work()
    times: list[float] = []
    while not times or (len(times) < 3 and perf_counter() - begun < _MOMENT_S / 4):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return max(min(times), 1e-9)
