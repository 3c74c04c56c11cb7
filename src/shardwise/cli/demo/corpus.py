"""Real text that every machine with Python has: the source of the standard library, and a baseline on it."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shardwise.errors import LaunchError

Bytes = npt.NDArray[np.uint8]
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes. No file is in both."""

    train: Bytes
    heldout: Bytes
    train_files: int
    heldout_files: int


def load() -> Corpus:
    """The standard library's source, about a tenth of its files held out.

    Which ones is decided by a hash of the file's path, so a file stays on its side on every machine.

    Raises:
        LaunchError: this Python comes without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED.intersection(name.parts):
            continue
        try:
            text = path.read_bytes()
        except OSError:  # a dangling link, or not ours to read
            continue
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 26  # 26 of 256
        sides[held_out].append(text + b"\n\n")
    train, heldout = (np.frombuffer(b"".join(side), dtype=np.uint8) for side in sides)
    if len(train) < 1 << 20 or len(heldout) < 1 << 16:
        raise LaunchError(
            f"there is too little Python source under {root} to train on",
            fix="use a Python installation that includes its standard library as .py files",
        )
    return Corpus(train, heldout, len(sides[0]), len(sides[1]))


def windows(data: Bytes, context: int, total: int, multiple: int) -> Bytes:
    """About ``total`` bytes to predict, in windows spread evenly: (windows, context + 1).

    The first byte of a window is given; the ``context`` bytes after it are to be predicted. The number of
    windows is a multiple of ``multiple``, so that ranks can share them out evenly.
    """
    last = len(data) - context - 1
    count = max(1, min(total, last) // context // multiple) * multiple
    starts = np.linspace(0, last, count).astype(np.int64)
    return data[starts[:, None] + np.arange(context + 1)]


def bigram_bits(train: Bytes, rows: Bytes) -> float:
    """Bits per byte of a table of byte pairs, counted on ``train`` with one added to each count.

    It is measured where the model is: every byte of a row after the first, given the byte before it.
    """
    pairs = train[:-1].astype(np.int64) * 256 + train[1:]
    counts = np.bincount(pairs, minlength=1 << 16).reshape(256, 256) + 1.0
    bits = -np.log2(counts / counts.sum(1, keepdims=True))
    return float(bits[rows[:, :-1], rows[:, 1:]].mean())


UNIFORM_BITS = math.log2(256)
