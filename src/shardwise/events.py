"""What a rank does, told as it happens: to whoever records a run, or plans one that has not begun.

The engine, the messages between ranks, the copies to and from the host and the requests to a disk say here what begins
and what is waited for. Nobody listens as a rule, and then each of these places costs one look at a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

NETWORK = ("gather", "reduce", "broadcast", "norm", "control")
"""Ways between ranks that have names of their own here; others are called as their message is."""
TO_HOST, TO_DEVICE, READ, WRITE = "to_host", "to_device", "read", "write"
"""Ways over the link between a device and its host, and to and from a disk."""
UPDATE = "update"
"""The update of a unit that takes place beside what follows; told as a transfer of no bytes."""


class Listener:
    """Hears of what this process does. Methods do nothing here: define those that you want.

    They are called in the middle of hot code, some by threads that read and write for the engine: be quick, and do not
    raise.
    """

    def phase(self, phase: str, unit: str) -> None:
        """This rank turns to something else: ``forward``, ``backward``, ``end of backward``, ``step``, ``update``.

        Args:
            unit: the name of the unit as reports show it, or of the optimizer.
            phase: empty, with an empty unit: no pass of a model and no step is under way. In a plan, where there is one
                thread only, what follows ``update`` takes place beside what follows after it.
        """

    def start(self, way: str, name: str, nbytes: int, ranks: tuple[int, ...] = ()) -> None:
        """A transfer begins.

        Args:
            way: the kind of a message (``gather``, ``reduce``, ...), or one of the constants of this module.
            name: the unit; for copies and requests to a disk, a name that no other has which is under way. Transfers of
                one way and name end in the order in which they began.
            nbytes: that this rank sends, or that cross.
            ranks: that take part, in the order of the group.
        """

    def wait(self, way: str, name: str) -> None:
        """Nothing that follows goes on before the first such transfer has ended."""

    def waited(self, way: str, name: str) -> None:
        """It has."""


explainers: list[Callable[[BaseException], None]] = []
"""Those that add to an error what its reader should know."""
listeners: list[Listener] = []
"""Those that listen in this process. Read by whoever has something to tell; changed by :func:`listening` only."""


@contextmanager
def listening(listener: Listener, *, alone: bool = False) -> Iterator[None]:
    """A block in which ``listener`` hears of what this process does.

    Args:
        alone: the others do not: it is a plan, and they want to hear of what is done.
    """
    others = listeners[:] if alone else []
    for other in others:
        listeners.remove(other)
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)
        listeners[:0] = others


def phase(phase: str, unit: str) -> None:
    for listener in listeners:
        listener.phase(phase, unit)


def start(way: str, name: str, nbytes: int, ranks: tuple[int, ...] = ()) -> None:
    for listener in listeners:
        listener.start(way, name, nbytes, ranks)


def wait(way: str, name: str) -> None:
    for listener in listeners:
        listener.wait(way, name)


def waited(way: str, name: str) -> None:
    for listener in listeners:
        listener.waited(way, name)


def failing(error: BaseException | None) -> None:
    """An error passes, on its way out of a pass or a step, or nobody caught it."""
    if error is not None:
        for explain in explainers:
            explain(error)
