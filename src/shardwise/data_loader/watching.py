"""Who wants to know which loader is being read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Watcher(Protocol):
    """Who wants to know which loader is being read: the innermost one counts.

    A watcher may also have a method ``loader_opens(loader)``, called when an iterator is asked for, and a method
    ``batch_comes(loader, exists)``. That is called on every rank before each batch is
    handed out (``exists`` is true, and ``loader.end_of_dataloader`` already says whether it is this rank's last), and
    once when the loop asks for another and there is none (``exists`` is false). It may communicate: ranks that read
    in step call it in step, until the first of them runs out. A third one, ``batch_is_done(loader)``, is called when
    the loop asks for more, before anything else has happened to the loader.
    """

    def loader_begins(self, loader: Any) -> None: ...

    def loader_ends(self, loader: Any) -> None: ...


_watching: list[Callable[[], Watcher]] = []


def watch_all(watcher: Callable[[], Watcher]) -> None:
    """Who wants to know about loaders that no Accelerator has prepared is what ``watcher()`` returns."""
    _watching[:] = [watcher]


def watcher_of_all() -> Watcher | None:
    return _watching[0]() if _watching else None
