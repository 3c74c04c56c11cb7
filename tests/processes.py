"""Processes for the tests: started in the middle of an interpreter's life, or anew, and ended with the test.

Most of what starting a rank costs is importing torch, some five seconds of a core each time. ``fork`` and ``script``
skip it: a process that has done the imports, and nothing else, forks. What is forked runs its function or script as
the main module, with an environment and a working directory of its own, and ends as any interpreter ends: excepthook,
threads, atexit. There are two such servers, so that ranks differ in their hash seed, as they do when
they are started one by one: what iterates over a set in different orders on different ranks must fail here.

Taking an interpreter apart, module by module, costs as much as all that most scripts here do, since nothing of it can
be shared with the server any more. So it is left out, unless ``whole_end`` asks for it: that is for tests of how
processes end, destructors included.

What ``module`` runs may start interpreters itself, as the launcher does. They are forked in the same way, and are its
children all the same; with ``new_interpreters`` they are started anew.

``program`` starts a new interpreter, for what is about the start itself.

Whatever a test leaves running is killed at its end (``end_all``, called from conftest.py), with all it has started.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import multiprocessing.util
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import process_servers
from process_servers import RICH, Server

_started: list[Process] = []
_servers: dict[bool, list[Server]] = {}  # by whether they have imported what tests of other libraries need
_nests: list[str] = []  # where servers come from, if this process has not to start them
_numbers = itertools.count()  # of ports


class _Handle(Protocol):
    pid: int

    def poll(self) -> int | None: ...


class Process:
    """A running process whose output goes to files: it cannot block on a pipe, and nobody blocks on it."""

    def __init__(self, handle: _Handle, out: Path | None = None, err: Path | None = None) -> None:
        self._handle, self._out, self._err = handle, out, err
        self.pid = handle.pid
        _started.append(self)

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal's number where one ended it, or ``None`` while it runs."""
        return self._handle.poll()

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out else ""

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err else ""

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def until(self, condition: Callable[[], Any], timeout: float = 100.0) -> Any:
        """The condition's value once it is true, checked while this process runs.

        Raises:
            AssertionError: the process ended before, or the time is over.
        """
        end = time.monotonic() + timeout
        while not (value := condition()):
            assert self.returncode is None, f"ended with {self.returncode} before\n{self.out}\n{self.err}"
            assert time.monotonic() < end, f"not within {timeout} s\n{self.out}\n{self.err}"
            time.sleep(0.05)
        return value

    def finish(self, timeout: float = 120.0) -> tuple[int, str, str]:
        """Exit code and output, once it has ended.

        Raises:
            AssertionError: it has not within ``timeout`` seconds; it is then killed.
        """
        end = time.monotonic() + timeout
        while (code := self.returncode) is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"did not end within {timeout} s\n{self.out}\n{self.err}")
            time.sleep(0.02)
        return code, self.out, self.err

    def kill(self) -> None:
        """End it and everything it has started, also in other sessions."""
        if self._handle.poll() is None:
            os.kill(self.pid, signal.SIGSTOP)  # starts nothing more
            for pid in [self.pid, *descendants(self.pid)]:
                for end in (os.killpg, os.kill):  # descendants lead groups of their own, or are in another's
                    try:
                        end(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
        if self in _started:
            _started.remove(self)


def live_in(nests: list[str]) -> None:
    """Have servers from there; see :class:`~process_servers.Nest`."""
    _nests[:] = nests


def keep(process: Process) -> None:
    """Let it live after the test that started it."""
    _started.remove(process)


def collect_rarely() -> None:
    """What the imports have left is no garbage. Whoever collects (``free_memory``, tests of what is dropped) need not
    look through a million objects of torch each time; and the collector need not come by itself as often as it does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def end_all() -> None:
    """Kill what the tests have left running, but for the ranks of the pools."""
    for process in list(_started):
        process.kill()


def fork(
    function: Callable[..., Any],
    *args: Any,
    number: int = 0,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    connected: bool = False,
    whole_end: bool = False,
    rich: bool = False,
) -> tuple[Process, Connection]:
    """Call a module-level function in a new process.

    Args:
        function: by reference; a ``connected`` one is given the other end of the returned connection first.
        args: picklable.
        number: even and odd ones come from interpreters with different hash seeds.
        environment: all of its variables; ``None`` for this process's.
        cwd: its working directory.
        connected: whether the connection stays open after the start.
        whole_end: whether the interpreter is taken apart in the end, with all destructors.
        rich: whether it may begin with other libraries imported.

    Returns:
        The process, and our end of a connection to it.
    """
    rich = rich and bool(_nests)
    if rich not in _servers:
        _servers[rich] = [Server(nest + RICH * rich) for nest in _nests] or [Server(), Server()]
    folder = Path(multiprocessing.util.get_temp_dir())  # of the session, and removed with it
    out, err = (Path(_new_file(folder, name)) for name in ("out", "err"))
    ours, theirs = multiprocessing.Pipe()
    with theirs, out.open("wb") as out_file, err.open("wb") as err_file:
        handle = _servers[rich][number % 2].fork([theirs.fileno(), out_file.fileno(), err_file.fileno()])
    process = Process(handle, out, err)
    ours.send((bytes(multiprocessing.current_process().authkey), str(folder), dict(environment or os.environ), cwd))
    ours.send((function, args, connected, whole_end))
    return process, ours


def script(path: Path, *args: object, **options: Any) -> Process:
    """Run a script as the main module of a forked interpreter; ``options`` are ``fork``'s."""
    return fork(process_servers.script, path, [str(a) for a in args], **options)[0]


def module(name: str, *args: object, new_interpreters: bool = False, **options: Any) -> Process:
    """The same for ``python -m name``. Interpreters that it starts are forked, unless they are to be new ones."""
    return fork(
        process_servers.module if new_interpreters else process_servers.nursing_module,
        name,
        [str(a) for a in args],
        **options,
    )[0]


def program(*command: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Process:
    """Start ``python`` anew with these arguments."""
    folder = Path(multiprocessing.util.get_temp_dir())
    out, err = (Path(_new_file(folder, name)) for name in ("out", "err"))
    with out.open("wb") as out_file, err.open("wb") as err_file:
        popen = subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment, cwd=cwd, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file,
        )  # fmt: skip
    return Process(popen, out, err)


def free_port() -> int:
    """A port that nobody listens on, for ranks to meet at, perhaps much later.

    Not one that the system hands to whoever connects (from 32768 on), nor one of another process that runs tests.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 5
    for number in _numbers:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port := 12000 + 4000 * worker + (os.getpid() + number) % 4000))
            except OSError:  # somebody has it: the next one
                continue
            return port
    raise AssertionError("unreachable")


def ranks_of_a_script(path: Path, size: int, *args: object, whole_end: bool = False) -> list[Process]:
    """Run a script on ``size`` ranks without a launcher, which would have its own word at the end."""
    port = free_port()
    return [
        script(
            path, *args, number=rank, environment=os.environ | rank_environment(rank, size, port), whole_end=whole_end
        )
        for rank in range(size)
    ]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended; one whose parent has not yet asked for its end has."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def _new_file(folder: Path, name: str) -> str:
    handle, path = tempfile.mkstemp(prefix=name, dir=folder)
    os.close(handle)
    return path


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):  # it has ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        waiting += children.get(waiting[0], [])
        found += children.get(waiting.pop(0), [])
    return found


@contextmanager
def longest_file(nbytes: int):
    """What this process writes into a file beyond that fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
