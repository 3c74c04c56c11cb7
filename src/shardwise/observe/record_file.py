"""The file that a rank writes while it is recorded: lines of JSON, readable after a kill at any moment.

``RUN_DIR/<run>-rank<00000>.jsonl``; ``<run>`` is the same for all ranks of a run. One JSON object per line, of these
kinds. A line is in the file at most half a second after what it tells of, and is never changed; a killed run lacks its
last line or two. Times are seconds since the record began, by this rank's own clock; bytes are bytes.

``run`` (the first line)
    ``format`` (1), ``run``, ``rank``, ``world``, ``time`` (when the record began, seconds since 1970), ``states``
    (names, in the order of the lists of bytes below), ``device`` (``type``, ``name``, ``peak_flops``: of 16-bit
    products by its data sheet, or null), ``threads``, ``torch`` and ``shardwise`` (versions).
``model`` (one for each sharded model, when it is first seen)
    ``name``, ``strategy``, ``parameters``, ``trainable`` (elements), ``units`` (names).
``step``
    ``step`` (its number, from 1), ``steps`` (how many the line stands for: 1, but in long runs 2, 4, ...; then it is
    the last one's number, and numbers below are sums, means or maxima), ``start``, ``end``,
    ``seconds`` (by phase: ``forward``, ``loss``: from a forward to its backward, ``backward``, ``recompute``, ``end of
    backward``, ``step``, ``evaluation``: forwards without gradients and what is between them, ``outside``: what the
    script does besides; together they are ``end`` - ``start``),
    ``waits`` (by way: seconds of these in which this rank went no further),
    ``sent`` (by way: bytes; ``gather``, ``reduce``, ... between ranks, ``to_host``, ``to_device``, ``read`` and
    ``write``),
    ``micro_batches``, ``rows``, ``tokens`` (null if unknown), ``loss`` (mean of those told, or null), ``values``
    (numbers told with ``tell``; "NaN", "Infinity" and "-Infinity" are texts, in ``loss`` too),
    ``live`` (bytes by state at the end), ``peak`` (the most by state at turns from phase to phase, and last of all
    states together), ``allocated`` (the most bytes this process had of its device so far, by torch; null on a CPU),
    ``resident`` (bytes of this process in the host's memory, or null), ``flops`` (of this rank; null if not counted),
    ``counting`` (true: operations were counted in this step, which took longer for it),
    ``clock`` (``device``: ``seconds`` and ``waits`` are by the clock of a device that runs late, from the moment on at
    which the first forward found it idle; so it is in steps with a timeline. ``host``: they say when such a device was
    told. Always ``host`` on a CPU, where both are one).
``timeline`` (of a few steps: the third to fifth, then every 100th and rarer)
    ``step``, ``names`` (texts that the lists below refer to by number), ``phases`` (``[at, phase, unit]``), ``memory``
    (``[at, bytes of each state...]``), ``transfers`` (``[began, waited for or null, way, name, bytes]``), ``waits``
    (``[from, to, way, name, beside]``; ``beside`` is 1 in threads that work beside the one that computes),
    ``left_out`` (moments that were too many). ``at`` etc. are whole microseconds, by the clock of the step's line.
``end``
    ``peak`` (the most bytes by state in the whole run, exact), ``peak_total`` (of all states together), ``recorder_s``
    (seconds that the recorder itself took between steps). Missing: the run was killed.

How much: less than 1 KB per step for the first 4,096; then lines stand for 2 steps, 4,096 lines later for 4. A timeline
takes some 100 bytes for each message of its step.
"""

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

    def begin(self, line: dict[str, Any]) -> None:
        """The first line, at once."""
        self.add(lambda: line)
        self.flush()

    def add_step(self, line: dict[str, Any]) -> None:
        """One more step; in long runs a line stands for several. Its losses and values may be tensors,
        and ``later`` gives what is to be known when the line is written."""
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
        step |= step.pop("later")()
        losses = [float(loss) for loss in step["loss"]]
        step["loss"] = finite(sum(losses) / len(losses)) if losses else None
        step["values"] = {key: finite(float(value)) for key, value in step["values"].items()}
    return merged(steps)
