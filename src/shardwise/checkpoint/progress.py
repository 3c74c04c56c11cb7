"""A bar for what takes long: on a terminal, on one rank, gone when it is done."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from shardwise.comm import World


class Progress:
    """Shows how many bytes of ``total`` are done, on rank 0 and only where stderr is a terminal.

    Args:
        what: one or two words: ``checking``, ``loading``.
        total: bytes.
        shown: whether anybody wants it.
    """

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        self._bar: Any = None
        self._what, self._total = what, total
        self._shown = shown and sys.stderr.isatty() and World.current().rank == 0

    def __enter__(self) -> Progress:
        if self._shown:
            from rich import progress as rich
            from rich.console import Console

            size, speed = rich.DownloadColumn(), rich.TransferSpeedColumn()
            columns = rich.TextColumn("{task.description}"), rich.BarColumn(), size, speed, rich.TimeRemainingColumn()
            self._bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        return self

    def add(self, nbytes: int) -> None:
        """So many bytes more are done."""
        if self._bar is not None:
            self._bar.advance(self._task, nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
