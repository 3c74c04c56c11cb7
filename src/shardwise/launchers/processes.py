"""Forked ranks: started, watched, and ended, all of them, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, TextIO

import torch
import torch.distributed as dist

from shardwise import device
from shardwise.errors import LaunchError, RankFailed, first_line
from shardwise.state import AcceleratorState

_GRACE_S = 8.0  # survivors of a failed rank have this long for their last words
_TERM_S = 5.0  # after SIGTERM, before SIGKILL
_MOST_WORDS = 20_000  # characters of a traceback; a pipe holds as much without a reader


@dataclass(frozen=True)
class Job:
    """What to run, and where the ranks meet."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    number: int  # ranks on this host
    hosts: int
    host: int  # this host's number
    address: str
    port: int  # 0 for a free one
    variables: dict[str, str]
    restarts: int = 0
    interval: float = 0.1
    prefix: str | None = None
    timeout: float = 900.0


def check_fork() -> None:
    """Refuse what forked ranks would inherit and cannot use.

    Raises:
        LaunchError: a device, a process group or an Accelerator is in use in this process already.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise LaunchError("this system cannot fork", fix="put the function into a script: shardwise launch")
    if (kind := device.in_use()) is not None:
        raise LaunchError(
            f"{kind} was used in this process before, and a forked rank cannot use it any more",
            fix=f"restart the notebook, and touch {kind} devices only inside the function",
        )
    if dist.is_initialized():
        raise LaunchError(
            "this process has a process group already", fix="call the launcher before, or in a process without one"
        )
    if AcceleratorState.exists():
        raise LaunchError(
            "an Accelerator was created in this process before, for one rank",
            fix="restart the notebook, and create the Accelerator inside the function",
        )


def run(job: Job) -> None:
    """Run the job's ranks to their end.

    Raises:
        LaunchError: they cannot be forked, or cannot meet.
        RankFailed: one failed. All have ended.
    """
    check_fork()
    for attempt in range(job.restarts + 1):
        # A store of its own for each attempt: the words of one that failed would mislead the next.
        store = _store(job)
        with _ranks(job, store.port, attempt) as ranks:
            failure = _watch(ranks, job.interval)
        del store  # frees the port
        if failure is None:
            return
        left = job.restarts - attempt
        if not left:
            raise failure
        again = f"starting all ranks anew ({left} restart{'s' * (left > 1)} left)"
        print(f"shardwise: {failure.what.splitlines()[0]}; {again}", file=sys.stderr, flush=True)


def _store(job: Job) -> Any:
    """The rendezvous store. This process hosts it, so that it outlives a rank that fails."""
    try:
        return dist.TCPStore(
            job.address,
            job.port,
            is_master=job.host == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=job.timeout),
        )
    except (RuntimeError, OSError) as error:
        raise LaunchError(
            f"cannot meet at {job.address}:{job.port}: {first_line(error)}",
            fix="another port with use_port=..., which is free on host 0 and reachable from all",
        ) from None


@dataclass
class _Rank:
    number: int
    process: Any
    words: Connection  # its traceback, and whether another rank's failure caused it


@contextmanager
def _ranks(job: Job, port: int, attempt: int) -> Iterator[list[_Rank]]:
    """Forked ranks. Whatever happens in the block, none is left after it."""
    context = multiprocessing.get_context("fork")
    ranks: list[_Rank] = []
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for local in range(job.number):
            ours, theirs = context.Pipe(duplex=False)
            variables = {
                **job.variables,
                "RANK": str(job.host * job.number + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(job.hosts * job.number),
                "LOCAL_WORLD_SIZE": str(job.number),
                "GROUP_RANK": str(job.host),
                "MASTER_ADDR": job.address,
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already
                "TORCHELASTIC_RESTART_COUNT": str(attempt),
            }
            process = context.Process(target=_child, args=(job, variables, theirs, os.getpid()))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)
                process.start()
            theirs.close()
            ranks.append(_Rank(int(variables["RANK"]), process, ours))
        yield ranks
    finally:
        _end(ranks)


def _watch(ranks: list[_Rank], interval: float) -> RankFailed | None:
    """Wait for the ranks. After the first failure the others have a moment to say what they waited for."""
    running = list(ranks)
    failed: list[tuple[_Rank, str, bool]] = []
    until = float("inf")
    while running and time.monotonic() < until:
        wait([rank.process.sentinel for rank in running], timeout=max(interval, 0.01))
        for rank in [r for r in running if not r.process.is_alive()]:
            running.remove(rank)
            if rank.process.exitcode:
                failed.append((rank, *_words(rank)))
                until = min(until, time.monotonic() + _GRACE_S)
    if not failed:
        return None
    rank, text, _ = next((f for f in failed if not f[2]), failed[0])
    return RankFailed(
        f"rank {rank.number} failed\n{text}".rstrip(),
        fix="look at its traceback above; all ranks have ended" if text.startswith("Traceback") else "",
    )


def _words(rank: _Rank) -> tuple[str, bool]:
    try:
        if rank.words.poll():
            text, second = rank.words.recv()
            return text, second
    except EOFError:  # it ended in the middle of a word
        pass
    code = rank.process.exitcode
    if code >= 0:
        return f"it ended with exit code {code}", False
    name = signal.Signals(-code).name
    return f"it was ended by {name}" + (" (often the kernel, out of memory)" if name == "SIGKILL" else ""), False


def _end(ranks: list[_Rank]) -> None:
    """End what is left: by SIGTERM, then by SIGKILL, with the processes that ranks have started."""
    for number, patience in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _TERM_S)):
        alive = [rank for rank in ranks if rank.process.is_alive()]
        for rank in alive:
            try:
                os.killpg(rank.process.pid, number)
            except ProcessLookupError:  # it has not got as far as a group of its own, or is gone
                rank.process.kill()
        until = time.monotonic() + patience
        try:
            for rank in alive:
                rank.process.join(max(0.0, until - time.monotonic()))
        except KeyboardInterrupt:  # a second one: at once, then
            continue
    for rank in ranks:
        rank.words.close()


# --- inside a rank ------------------------------------------------------------------------------
def _child(job: Job, variables: dict[str, str], words: Connection, parent: int) -> None:
    os.setsid()  # Ctrl-C in the notebook reaches the parent only, which ends all ranks
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    os.environ.update(variables)
    torch.set_num_threads(1)  # a forked OpenMP would wait for threads that were not forked
    if job.prefix is not None:
        sys.stdout, sys.stderr = (_Prefixed(out, job.prefix, variables) for out in (sys.stdout, sys.stderr))
    code = 0
    try:
        job.function(*job.args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001  (whatever it is, the parent must hear of it)
        code = 1
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None  # without this frame
        sys.excepthook(type(error), error, error.__traceback__)  # tells the other ranks, too
        words.send((_traceback(error), isinstance(error, RankFailed)))
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, _Prefixed):
            out.write("\n" * bool(out._line))
        out.flush()
    # Not the end of an interpreter: what the parent registered for its own end is not this process's to run.
    os._exit(code)


def _traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if len(text) > _MOST_WORDS:
        text = f"{text[: _MOST_WORDS // 2]}\n[...]\n{text[-_MOST_WORDS // 2 :]}"
    if "Cannot re-initialize CUDA in forked subprocess" in text or "autograd's threading" in text:
        text += "restart the notebook: CUDA or autograd was used before the launcher was called\n"
    return text


def _follow(parent: int) -> None:
    """End with the parent: a notebook that is killed leaves no ranks behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpid(), signal.SIGKILL)


class _Prefixed:
    """A stream that puts a few words before every line."""

    def __init__(self, stream: TextIO, template: str, variables: dict[str, str]) -> None:
        self._stream, self._line = stream, ""
        self._prefix = template
        for name in ("rank", "local_rank"):
            self._prefix = self._prefix.replace(f"${{{name}}}", variables[name.upper()])
        self._prefix = self._prefix.replace("${role_name}", "default").replace("${host}", socket.gethostname())

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        # A line in one piece: other ranks write to the same place.
        self._stream.write("".join(f"{self._prefix}{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
