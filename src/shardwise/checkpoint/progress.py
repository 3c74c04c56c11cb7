"""A bar for what takes long: on a terminal, on one rank, after a moment, gone when it is done."""

from __future__ import annotations

import sys
import threading
from time import monotonic
from types import TracebackType
from typing import Any

from shardwise.comm import World

_MOMENT_S = 1.0  # what takes less needs no bar


class Progress:
    """Shows how many bytes of ``total`` are done, on rank 0 and only where stderr is a terminal.

    Several threads may :meth:`add`.

    Args:
        what: one or two words: ``checking``, ``loading``.
        total: bytes.
        shown: whether anybody wants it.
    """

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        self._bar: Any = None
        self._what, self._total, self._done = what, total, 0
        self._shown = shown and sys.stderr.isatty() and World.current().rank == 0
        self._from = monotonic() + _MOMENT_S
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        return self

    def add(self, nbytes: int) -> None:
        """So many bytes more are done."""
        if not self._shown:
            return
        with self._lock:
            self._done += nbytes
            if self._bar is None and monotonic() >= self._from:
                self._begin()
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)

    def _begin(self) -> None:
        from rich import progress as rich
        from rich.console import Console

        size, speed = rich.DownloadColumn(), rich.TransferSpeedColumn()
        columns = rich.TextColumn("{task.description}"), rich.BarColumn(), size, speed, rich.TimeRemainingColumn()
        self._bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._what, total=self._total)
        self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
