"""Saves that go on while the training does: the one that is under way, and what became of it."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

from shardwise.checkpoint.blocks import Buffers
from shardwise.checkpoint.ranks import Apart, Together
from shardwise.checkpoint.storage import Plans
from shardwise.comm import World
from shardwise.errors import ShardwiseError


class AsyncSave:
    """A save that is being written in the background.

    Args:
        path: where the checkpoint will stand.
        work: copies what is left to copy and then calls what it is given; writes it all, and takes part in the ranks'
            agreement. Runs in a thread; an interpreter does not end before it.
    """

    def __init__(self, path: Path, work: Callable[[Callable[[], None]], None]) -> None:
        self.path = path
        self._work = work
        self._copied = threading.Event()
        self._error: BaseException | None = None
        self.told = False  # somebody knows how it ended
        self._thread = threading.Thread(target=self._run, name="shardwise-save", daemon=False)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Has it ended, well or not? Ranks may see it a moment apart."""
        return not self._thread.is_alive()

    def wait_for_copy(self) -> None:
        """Wait until this rank's optimizer state is copied, or the save has failed. No collective.

        ``optimizer.step()`` does it by itself. Call it before changing optimizer state in other ways.
        """
        self._copied.wait()

    def wait(self) -> Path:
        """Wait until the checkpoint stands.

        Returns:
            Its path.

        Raises:
            CheckpointError: it could not be written, on whatever rank; every rank that waits raises. What was there
                before is still there.
            CommError: another rank has ended.
        """
        self._thread.join()
        self.told = True
        error = self._error
        if isinstance(error, ShardwiseError):  # one object raised in several places would collect their tracebacks
            raise type(error)(error.what, where=error.where, fix=error.fix) from error
        if error is not None:
            raise error
        return self.path

    def _run(self) -> None:
        try:
            with self:
                self._work(self._copied.set)
        finally:
            self._copied.set()

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self._error = error
        return True

    def last_words(self) -> str:
        """What to say when the interpreter ends and nobody has asked how it went."""
        if self._error is None or self.told or not self.done:
            return ""
        return f"shardwise: checkpoint {self.path} was not written\n{self._error}"


class _Unflushed:
    """A standard stream that cannot be flushed when the interpreter ends: the exit status is then 120 (``sys.exit``).

    A save that failed and that nobody asked about is lost output of the same kind, and at that point there is no other
    way to a status that leaves everybody else's ``atexit`` functions alone.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        self._stream.flush()
        if sys.is_finalizing():
            raise OSError("a checkpoint was not written")


class Background:
    """What saves keep for the next one, and the asynchronous one that is under way. Made by all ranks together.

    ``buffers`` are those of asynchronous saves: host memory as large as what this rank saves.
    """

    def __init__(self) -> None:
        self.buffers, self.plans, self.share = Buffers(limit=None), Plans(), Apart()
        self.last: AsyncSave | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.last is not None and (words := self.last.last_words()):
            if World.current().rank == 0:
                print(words, file=sys.stderr, flush=True)
            sys.stderr = cast(TextIO, _Unflushed(sys.stderr))

    @staticmethod
    def of(world: World) -> Background:
        if world.saver is None:
            world.saver = Background()
        found = world.saver
        assert isinstance(found, Background)
        return found


def wait_for_saves() -> None:
    """Wait for the save that is under way, if there is one. No collective: all ranks know how it ended.

    Raises:
        CheckpointError: it failed, and nobody here was told.
    """
    saver: Background | None = World.current().saver
    if saver is not None and saver.last is not None and not saver.last.told:
        saver.last.wait()


def settle_saves() -> None:
    """:func:`wait_for_saves` before the next save or load. A collective: if it was raised to some ranks only, so far,
    all raise now.

    Raises:
        CheckpointError: on every rank.
    """
    saver: Background | None = World.current().saver
    if saver is None or saver.last is None:
        return
    last, saver.last = saver.last, None
    with Together(f"writing checkpoint {last.path}", slow=True):
        if not last.told:
            last.wait()
