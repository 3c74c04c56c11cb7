"""What ranks tell each other while they save and load, errors that all of them must raise, and a progress bar."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any

import torch

from shardwise.comm import World
from shardwise.comm.objects import exchange, in_place, to_bytes
from shardwise.comm.stats import Op
from shardwise.errors import CheckpointError, CommError, ShardwiseError

_OP = Op("exchange", "the checkpoint", 0)  # in process groups that nobody else uses
_TIMEOUT = 660.0  # unlike any other timeout, which gives it a group of its own
SLOW_TIMEOUT = 6 * 3600.0
_BACKGROUND_TIMEOUT = SLOW_TIMEOUT + 1  # again a group of its own
"""Seconds to wait for the other ranks: to begin with, and while they read and write files. A rank that dies is
noticed at once; this is for one that never comes, because only some ranks save."""


AllGatherBytes = Callable[[bytes, float], list[bytes]]
"""How ranks tell each other something: :func:`all_gather_bytes`, or :class:`BackgroundGather`."""


def all_gather_bytes(data: bytes, timeout: float = _TIMEOUT) -> list[bytes]:
    """Every rank's bytes, in rank order.

    Cost: a collective of half a KiB, and a second one if a rank has more; then each rank sends its bytes, padded to the
    longest, to every other rank.
    """
    if World.current().size == 1:
        return [data]
    return _gather(data, lambda flat: World.current().control_group(timeout).all_gather(flat, _OP).wait())


class BackgroundGather:
    """:func:`all_gather_bytes` for a thread beside the training.

    In a process group of its own, and out of the way of what says where this rank is. Made by all ranks together, by
    the main thread.
    """

    def __init__(self) -> None:
        self._world = World.current()
        self._group = self._world.control_group(_BACKGROUND_TIMEOUT)

    def __call__(self, data: bytes, timeout: float = SLOW_TIMEOUT) -> list[bytes]:
        return [data] if self._world.size == 1 else _gather(data, self._all_gather, self._world)

    def _all_gather(self, flat: torch.Tensor) -> None:
        pg = self._group.pg
        if pg is None:
            raise CommError(
                "the process groups were closed while a checkpoint was being written; it was not finished",
                where=f"rank {self._world.rank}",
                fix="call checkpoint.wait_for_saves() before closing them",
            )
        rows, peers = flat.view(self._world.size, -1), self._group.peers()
        tracker = self._world.tracker
        tracker.beside = (_OP, self._group, perf_counter())
        try:
            works = [pg.recv([rows[r]], r, _OP.tag) for r in peers]
            works += [pg.send([rows[self._world.rank]], r, _OP.tag) for r in peers]
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise CommError(
                "another rank ended while a checkpoint was being written; it was not finished",
                where=f"rank {self._world.rank}",
                fix="load the latest complete one",
            ) from error
        finally:
            tracker.beside = None


def _gather(data: bytes, all_gather: Callable[[torch.Tensor], object], world: World | None = None) -> list[bytes]:
    world = world or World.current()
    return [to_bytes(row) for row in exchange(data, in_place(world.rank, world.size, all_gather))]


def broadcast_text(text: str) -> str:
    """Rank 0's text, on every rank."""
    return all_gather_bytes(text.encode() if World.current().rank == 0 else b"")[0].decode()


_GOOD, _BAD = b"+", b"-"


class CollectiveBlock:
    """A block that all ranks leave alike: if it fails on one of them, it raises on all.

    Inside, a rank must not enter a collective that another rank may not reach. A failure of a collective
    itself, or an interrupt, is passed on at once: there is nobody to tell.

    Args:
        doing: what the block does, for the message: ``writing checkpoint /a/b``.
        slow: the block reads or writes much, and some ranks may take far longer than others.
        by: how ranks tell each other.
        raises: what ranks raise that had no error of their own.

    Attributes:
        mine: what this rank tells the others when the block ends well; set it inside.
        gathered: what all ranks told, in rank order; afterwards.

    Raises:
        CheckpointError: or ``raises``, on ranks that had no error of their own, with the first failing rank's words.

    Cost: one :func:`all_gather_bytes` when the block ends.
    """

    def __init__(
        self,
        doing: str,
        slow: bool = False,
        by: AllGatherBytes = all_gather_bytes,
        raises: type[ShardwiseError] = CheckpointError,
    ) -> None:
        self.doing, self.timeout, self.gather = doing, SLOW_TIMEOUT if slow else _TIMEOUT, by
        self.raises = raises
        self.mine = b""
        self.gathered: list[bytes] = []

    def __enter__(self) -> CollectiveBlock:
        if self.gather is all_gather_bytes and World.current().size > 1:
            World.current().control_group(self.timeout)  # made while all ranks are here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and (not isinstance(error, Exception) or isinstance(error, CommError)):
            return
        mine = None if error is None else _described(error, self.doing)
        words = _GOOD + self.mine if mine is None else _BAD + json.dumps([mine.what, mine.where, mine.fix]).encode()
        told = self.gather(words, self.timeout)
        if error is not None:
            if mine is not error and isinstance(error, (OSError, ShardwiseError)):
                assert mine is not None
                raise mine from error
            return
        for rank, text in enumerate(told):
            if text[:1] == _BAD:
                what, where, fix = json.loads(text[1:])
                raise self.raises(what, where=f"rank {rank}, {where}" if where else f"rank {rank}", fix=fix)
        self.gathered = [text[1:] for text in told]


def _described(error: Exception, doing: str) -> ShardwiseError:
    if isinstance(error, ShardwiseError):
        return error
    if isinstance(error, OSError):
        fix = "check that the directory can be written, is shared by all ranks, and that the disk is not full"
        return CheckpointError(f"{doing}: {error.strerror or error}", where=str(error.filename or ""), fix=fix)
    return CheckpointError(f"{doing}: {type(error).__name__}: {error}", fix="see that rank's own traceback")


# --- progress ----------------------------------------------------------------------------------
_MOMENT_S = 1.0  # what takes less needs no bar


class Progress:
    """Shows how many bytes of ``total`` are done, on rank 0 and only where stderr is a terminal.

    Several threads may :meth:`add`.

    Args:
        what: one or two words: ``checking``, ``loading``.
        total: bytes; may be set until the first are done.
        shown: whether anybody wants it.
    """

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        self._bar: Any = None
        self._what, self.total, self._done = what, total, 0
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
        self._task = self._bar.add_task(self._what, total=self.total)
        self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
