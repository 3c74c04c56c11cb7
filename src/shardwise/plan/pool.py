"""Predictions of many strategies, by as many processes as there are cores.

They are forked, for what a model's own code raises inside of a backward on the planned device ends the process (torch's
device guard for such devices cannot be left while a Python error is pending). Then it is done once more, slowly, with
every error written down as it is raised. A process goes on with the next item as long as nothing was raised: torch
remembers what operations on tensors without values return, and has to find it out only once.
"""

from __future__ import annotations

import faulthandler
import gc
import mmap
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from shardwise import device as devices
from shardwise.comm import World
from shardwise.errors import PlanError, ShardwiseError
from shardwise.plan.building import said

T = TypeVar("T")
_NOTE = 4096  # bytes of what is written down
_NO_ERRORS = (StopIteration, StopAsyncIteration, GeneratorExit, SystemError)  # the last one: torch lost the error
_FORKED = "autograd's threading in combination with fork"
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))


def each(work: Callable[[Any], T], items: Sequence[Any], processes: int | None = None) -> Iterator[T | ShardwiseError]:
    """Do something with each item, several at a time where processes can be forked; results in the items' order.

    What raises gives one :class:`ShardwiseError` as its result, and so does what ends its process.

    Args:
        work: what it returns must be picklable.
        processes: at a time; by default one per core.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or devices.in_use() is not None:
        yield from (_here(work, item) for item in items)
        return
    most = min(processes or os.cpu_count() or 1, len(items))
    done: dict[int, Any] = {}
    running: dict[Connection, tuple[int, Any]] = {}
    following = iter(range(len(items)))

    def begin() -> None:
        index = next(following, None)
        if index is not None:
            process, pipe = _begin(lambda index: work(items[index]), index, beside=running)
            running[pipe] = index, process

    try:
        for _ in range(most):
            begin()
        for at in range(len(items)):
            while at not in done:
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    index, process = running.pop(ready)
                    found = done[index] = _received(ready)
                    if found is None:
                        done[index] = _what_it_raised(work, items[index])
                    if found is None or isinstance(found, ShardwiseError):
                        _end(ready, process)
                        begin()
                    elif (another := next(following, None)) is None:
                        _end(ready, process)
                    else:
                        with suppress(BrokenPipeError):  # it has ended meanwhile, which the next look finds
                            ready.send(another)
                        running[ready] = another, process
            yield done.pop(at)
    finally:
        for pipe, (_, process) in running.items():
            process.kill()
            _end(pipe, process)


def alone(work: Callable[..., T], *args: Any, patience_s: float) -> T:
    """Plan in a process of its own, where one can be forked: the planned device is registered with torch for good, and
    this process has real work to do.

    Args:
        patience_s: seconds to wait for it.

    Raises:
        ShardwiseError: what the work raises; the process ended, or is not done in time.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return work(*args)
    process, pipe = _begin(lambda given: work(*given), args, quiet=False)
    try:
        if not pipe.poll(patience_s):
            process.kill()
            raise PlanError(f"no plan was made in {patience_s:g} s", fix="name a strategy")
        found = pipe.recv()
    except EOFError:
        raise PlanError("the process that planned ended", fix="name a strategy, or try 'shardwise plan'") from None
    finally:
        pipe.close()
        process.join()
    if isinstance(found, ShardwiseError):
        raise found
    return found


def _here(work: Callable[[Any], T], item: Any) -> T | ShardwiseError:
    try:
        return _done(work, item)
    except SystemError:
        return PlanError("the model cannot run backward, and torch lost the error", fix="plan for CPUs to see it")


def _done(work: Callable[[Any], T], item: Any) -> T | ShardwiseError:
    try:
        return work(item)
    except ShardwiseError as error:
        return error
    except SystemError:  # of a backward, where torch did not end the process as it does most times
        raise
    except Exception as error:  # noqa: BLE001  (of a model's own code)
        if _FORKED in str(error):
            return PlanError(
                "this process has run a backward on an accelerator, and cannot simulate one any more",
                fix="plan before the first backward, or with 'shardwise plan'",
            )
        return PlanError(f"a step of the model cannot be simulated: {said(error)}")


def _begin(
    work: Callable[[Any], Any],
    item: Any,
    note: mmap.mmap | None = None,
    quiet: bool = True,
    beside: Iterable[Connection] | None = None,
) -> tuple[Any, Connection]:
    """
    Args:
        quiet: it prints nothing; else it may print, and have processes of its own.
        beside: connections to others like this one, which goes on with what comes through its own until that is closed.
    """
    here, there = multiprocessing.get_context("fork").Pipe(duplex=beside is not None)
    not_its = None if beside is None else [here, *beside]
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(work, item, there, not_its, note, quiet), daemon=quiet
    )
    sys.stdout.flush()
    sys.stderr.flush()
    process.start()
    there.close()
    return process, here


def _child(
    work: Callable[[Any], Any], item: Any, pipe: Connection, not_ours: Sequence[Connection] | None,
    note: mmap.mmap | None, quiet: bool,
) -> None:  # fmt: skip
    """Silent as a rule: what a model prints was printed when it was built first.

    Args:
        not_ours: the parent's ends of connections, if more items come through ``pipe``.
    """
    for connection in not_ours or ():
        connection.close()  # or nobody would notice that the parent has closed it, or has ended
    gc.freeze()  # what the parent has is no garbage of ours, and looking through it would copy its pages
    World._current = None  # the parent's ranks are not ours
    if quiet:
        faulthandler.disable()  # how such a process ends is told by the parent
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    with _one_thread():
        if note is not None:
            sys.settrace(_Errors(note))
        try:
            found = _done(work, item)
            while not_ours is not None and not isinstance(found, ShardwiseError):
                pipe.send(found)
                found = _done(work, pipe.recv())
        except (SystemError, EOFError, BrokenPipeError):
            os._exit(1)
        sys.settrace(None)
    pipe.send(found)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without what the parent has for its own end


def _received(pipe: Connection) -> Any:
    """What a process has found; ``None`` if it ended before."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def _end(pipe: Connection, process: Any) -> None:
    pipe.close()
    process.join()


def _what_it_raised(work: Callable[[Any], Any], item: Any) -> Any:
    note = mmap.mmap(-1, _NOTE)
    process, pipe = _begin(work, item, note)
    found = _received(pipe)
    _end(pipe, process)
    if found is not None:
        return found
    text = note[:].rstrip(b"\0").decode(errors="replace")
    if not text:
        return PlanError("a process that simulated a step has ended", fix="look whether there was memory for it")
    return PlanError(f"the model cannot run backward: {text}")


class _Errors:
    """A trace function that writes down the last error that was raised, and where."""

    def __init__(self, note: mmap.mmap) -> None:
        self._note, self._last, self._where = note, "", ""
        self._error: BaseException | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_lines = False
        if event == "exception" and not isinstance(arg[1], _NO_ERRORS):
            name = frame.f_code.co_filename
            if arg[1] is not self._error:
                self._error, self._where = arg[1], ""
            if not self._where and not name.startswith(_LIBRARIES) and name.endswith(".py"):
                self._where = f"{Path(name).name}, line {frame.f_lineno}: "
            kind = getattr(arg[0], "__name__", "error")
            text = f"{self._where}{kind}: {' '.join(str(arg[1]).split())[:300]}".encode()[: _NOTE - 1]
            self._note[:] = text.ljust(_NOTE, b"\0")
        return self


@contextmanager
def _one_thread() -> Iterator[None]:
    """A forked process has no threads of its parent's, and no use for any."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
