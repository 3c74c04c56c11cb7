"""How training is going: a live bar on a terminal, a plain line now and then elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

_LINE_EVERY_S = 10.0


class Progress:
    """Shown by rank 0; silent on the others.

    Args:
        shown: whether this rank shows anything.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.live: Any = None
        self.smooth: float | None = None
        self.said = time.monotonic()
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self.live = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.live.add_task("training", total=1.0, facts="first step ...")
            self.live.start()

    def step(self, number: int, bits: float, rate: float, fraction: float, elapsed: float) -> None:
        """After a step: its number, mean loss in bits per byte, bytes per second, and the part of the budget used."""
        if not self.shown:
            return
        self.smooth = bits if self.smooth is None else 0.9 * self.smooth + 0.1 * bits
        fraction = min(fraction, 1.0)  # the last step may end after the budget
        left = elapsed * (1 - fraction) / fraction if fraction > 0 else 0.0
        facts = f"step {number:,}  {self.smooth:.2f} bits/byte  {rate:,.0f} bytes/s  {clock(left)} left"
        if self.live is not None:
            self.live.update(self.task, completed=fraction, facts=facts)
        elif number == 1 or fraction >= 1 or time.monotonic() - self.said >= _LINE_EVERY_S:
            self.said = time.monotonic()
            print(f"training {fraction:4.0%}  {facts}", file=sys.stderr, flush=True)

    def phase(self, text: str) -> None:
        """What is done now that the training is over."""
        if self.live is not None:
            self.live.update(self.task, description=text, completed=1.0, facts="")
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()


def clock(seconds: float) -> str:
    """``75`` as ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
