"""The file that a rank writes while it is recorded: lines of JSON, readable after a kill at any moment."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from shardwise.errors import RecordError
from shardwise.observe.digest import finite, merged

FORMAT = 1
_LINES = 4096  # then each stands for twice as many steps
_OFTEN = 0.5  # seconds between writes: what a kill loses, besides the step under way


def file_of(folder: Path, run: str, rank: int) -> Path:
    """Where a rank of a run writes."""
    return folder / f"{run}-rank{rank:05d}.jsonl"


class RecordFile:
    """Lines of one rank. They wait in memory for half a second at most, then go out in one write.

    Args:
        path: must not be there yet; its folder is made.

    Raises:
        RecordError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[Callable[[], dict[str, Any]]] = []
        self._steps: list[dict[str, Any]] = []
        self._per_line, self._lines = 1, 0
        self._failed = False
        self._written = perf_counter()
        self._pid = os.getpid()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb", buffering=0)
        except OSError as error:
            raise RecordError(
                f"what this run does cannot be recorded there: {error.strerror or error}",
                where=str(path),
                fix="name a folder that every rank can write to",
            ) from error

    def add(self, line: Callable[[], dict[str, Any]]) -> None:
        """One more line, made when it is written: numbers that a device still computes are not waited for before."""
        if self._failed:
            return
        self._waiting.append(line)
        if perf_counter() - self._written > _OFTEN:
            self.flush()

    def add_step(self, line: dict[str, Any]) -> None:
        """One more step; in long runs a line stands for several. Its losses and values may be tensors."""
        self._steps.append(line)
        if len(self._steps) >= self._per_line:
            self._end_line()

    def _end_line(self) -> None:
        steps, self._steps = self._steps, []
        if steps:
            self.add(partial(_line_of, steps))
            self._lines += 1
            if self._lines % _LINES == 0:
                self._per_line *= 2

    def flush(self) -> None:
        """Write what waits. A full disk does not end a training: there is a warning, and nothing more is written."""
        if self._failed or os.getpid() != self._pid:  # a forked child has no part in it
            return
        lines, self._waiting = self._waiting, []
        left = b"".join(json.dumps(line(), separators=(",", ":")).encode() + b"\n" for line in lines)
        self._written = perf_counter()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._failed = True
            warnings.warn(
                f"{self.path}: what this rank does is not recorded any more: {error.strerror or error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self, last: dict[str, Any]) -> None:
        """Write what waits and a last line, and close."""
        self._end_line()
        self.add(lambda: last)
        self.flush()
        self._file.close()


def _line_of(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of some steps, for which the losses and values that were told are read."""
    for step in steps:
        losses = [float(loss) for loss in step["loss"]]
        step["loss"] = finite(sum(losses) / len(losses)) if losses else None
        step["values"] = {key: finite(float(value)) for key, value in step["values"].items()}
    return merged(steps)
