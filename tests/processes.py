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

import atexit
import ctypes
import gc
import importlib
import itertools
import multiprocessing
import multiprocessing.util
import os
import resource
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Protocol

_PRELOAD = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "shardwise.accelerator", "shardwise.cli.ranks",
    "pytest", "hypothesis",
)  # fmt: skip
_START_S = 150.0  # the imports, on a machine that does much else
_REQUEST = struct.Struct("=cq")  # b"f": fork (three file descriptors come along), b"p": how did this process end?
_REPLY = struct.Struct("=q")
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_RUNNING = 1 << 32  # no exit code
_started: list[Process] = []
_servers: list[_Server] = []
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
            for pid in [self.pid, *_descendants(self.pid)]:
                for end in (os.killpg, os.kill):  # descendants lead groups of their own, or are in another's
                    try:
                        end(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
        if self in _started:
            _started.remove(self)


def keep(process: Process) -> None:
    """Let it live after the test that started it."""
    _started.remove(process)


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

    Returns:
        The process, and our end of a connection to it.
    """
    if not _servers:
        _servers.extend(_Server() for _ in range(2))
    folder = Path(multiprocessing.util.get_temp_dir())  # of the session, and removed with it
    out, err = (Path(_new_file(folder, name)) for name in ("out", "err"))
    ours, theirs = multiprocessing.Pipe()
    with theirs, out.open("wb") as out_file, err.open("wb") as err_file:
        handle = _servers[number % 2].fork([theirs.fileno(), out_file.fileno(), err_file.fileno()])
    process = Process(handle, out, err)
    ours.send((bytes(multiprocessing.current_process().authkey), str(folder), dict(environment or os.environ), cwd))
    ours.send((function, args, connected, whole_end))
    return process, ours


def script(path: Path, *args: object, **options: Any) -> Process:
    """Run a script as the main module of a forked interpreter; ``options`` are ``fork``'s."""
    return fork(_script, path, [str(a) for a in args], **options)[0]


def module(name: str, *args: object, new_interpreters: bool = False, **options: Any) -> Process:
    """The same for ``python -m name``. Interpreters that it starts are forked, unless they are to be new ones."""
    return fork(_module if new_interpreters else _nursing_module, name, [str(a) for a in args], **options)[0]


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


def _descendants(root: int) -> list[int]:
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


# --- the servers --------------------------------------------------------------------------------
class _Server:
    """A process that has done the imports. It ends, with all it has forked, when this one does."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(_START_S)
        path = os.pathsep.join(p for p in sys.path if p)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import processes; processes._serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        atexit.register(self.close)

    def fork(self, files: list[int]) -> _Forked:
        socket.send_fds(self.control, [_REQUEST.pack(b"f", 0)], files)
        return _Forked(self, self._reply())

    def ask(self, pid: int) -> int | None:
        if self.control.fileno() < 0:
            return -signal.SIGKILL  # all of them ended with the server
        self.control.sendall(_REQUEST.pack(b"p", pid))
        code = self._reply()
        return None if code == _RUNNING else code

    def _reply(self) -> int:
        data = self.control.recv(_REPLY.size)
        assert data, "the server of the tests' processes has ended"
        return int(_REPLY.unpack(data)[0])

    def close(self) -> None:
        self.control.close()
        self.process.wait(timeout=30)


class _Forked:
    def __init__(self, server: _Server, pid: int) -> None:
        self.pid, self._server = pid, server
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._server.ask(self.pid)
        return self._code


def _serve(control: int) -> None:
    """The life of a server. Returns in what it has forked only, when that has done its work."""
    for name in _PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in the children leave these pages shared
    _answer(socket.socket(fileno=control))


def _answer(requests: socket.socket, adopted: bool = False) -> None:
    """Fork when told to, until nobody is left who could tell.

    Args:
        requests: from there.
        adopted: whether what is forked is to be a child of our parent's.
    """
    running: set[int] = set()
    while True:
        data, files, _, _ = socket.recv_fds(requests, _REQUEST.size, 3)
        if not data:
            for pid in running:
                try:
                    os.killpg(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            os._exit(0)
        kind, pid = _REQUEST.unpack(data)
        if kind == b"f":
            pid = _forked_twice() if adopted else os.fork()
            if not pid:
                requests.close()
                _forked(*files)
                return
            for file in files:
                os.close(file)
            if not adopted:
                running.add(pid)
            requests.sendall(_REPLY.pack(pid))
        else:
            done, status = os.waitpid(pid, os.WNOHANG)
            running -= {done}
            requests.sendall(_REPLY.pack(os.waitstatus_to_exitcode(status) if done else _RUNNING))


def _forked_twice() -> int:
    """As ``os.fork``, but when this returns, the new process's parent has ended, and it leads a session."""
    read, write = os.pipe()
    if between := os.fork():
        os.waitpid(between, 0)
        pid = int(_REPLY.unpack(os.read(read, _REPLY.size))[0])
    elif os.fork():
        os._exit(0)
    else:
        os.setsid()
        os.write(write, _REPLY.pack(os.getpid()))
        pid = 0
    os.close(read)
    os.close(write)
    return pid


def _forked(connection_file: int, out: int, err: int) -> None:
    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for file, number in ((out, 1), (err, 2)):
        os.dup2(file, number)
        os.close(file)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115  (a pipe's or file's buffering)
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    _unlike_others()
    connection = Connection(connection_file)
    key, folder, environment, cwd = connection.recv()
    process: Any = multiprocessing.current_process()
    process.authkey = key  # tensors travel as shared memory between processes that have it in common
    process._config["tempdir"] = folder
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    function, args, connected, whole_end = connection.recv()
    if connected:
        args = (connection, *args)
    else:
        connection.close()
    if whole_end:
        function(*args)
    else:
        _end(_exit_code(function, args))


def _exit_code(function: Callable[..., Any], args: Iterable[Any]) -> int:
    """Call it, and do with what it raises what the interpreter does."""
    try:
        function(*args)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001  (whatever it is, it is the hook's)
        sys.last_exc = sys.last_value = error
        sys.last_type, sys.last_traceback = type(error), error.__traceback__
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(code: int) -> NoReturn:
    """End as an interpreter does, but leave it to the system to free what it has."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001
            code = 120  # whatever it was
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _unlike_others() -> None:
    import numpy as np

    np.random.seed()  # as after a start of its own; Python's random does so by itself


def _script(path: Path, args: list[str]) -> None:
    sys.argv = [str(path), *args]
    sys.path[0] = str(path.parent)
    main = vars(sys.modules["__main__"])
    main["__file__"] = str(path)
    exec(compile(path.read_text(), str(path), "exec"), main)


def _module(name: str, args: list[str]) -> None:
    sys.argv = [name, *args]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


# --- processes that start interpreters ----------------------------------------------------------
def _nursing_module(name: str, args: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    if sys.platform == "linux":  # elsewhere nobody adopts the children of another
        _Popen.nursery = _Nursery()
        subprocess.Popen = subprocess_handler.Popen = _Popen  # type: ignore[misc,assignment]
    # It looks at the whole stack nine times, for a log that nobody keeps: most of what a launch costs in a process with
    # so many modules.
    dynamic_rendezvous.get_method_name = lambda depth=2: ""  # type: ignore[assignment]
    _module(name, args)


def _python(words: list[str], paths: str) -> None:
    """What ``python`` with these words does."""
    sys.stdout.reconfigure(write_through="-u" in words[:1])  # type: ignore[union-attr]
    words = words[words[0] == "-u" :]
    sys.path[1:1] = [path for path in paths.split(os.pathsep) if path and path not in sys.path]
    if words[0] != "-m":
        _script(Path(words[0]).absolute(), words[1:])
    elif words[1] == "shardwise":
        _nursing_module(words[1], words[2:])
    else:
        _module(words[1], words[2:])


class _Nursery(_Server):
    """A process beside this one that forks what this one starts as ``python ...``.

    Whoever starts ranks waits for them as for its own children. So each is forked twice, and this process, a
    "subreaper" of the kernel's, is its parent as soon as the one between has ended.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.control, theirs = socket.socketpair()
        if not os.fork():
            self.control.close()
            os.setsid()
            _answer(theirs, adopted=True)
            raise AssertionError("what it forks ends by itself")
        theirs.close()


class _Popen(subprocess.Popen):  # type: ignore[type-arg]
    """As ever, but for ``python ...`` with its output in files or in ours, which is forked."""

    nursery: _Nursery

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        self._forked = not isinstance(args, str) and list(args)[:1] == [sys.executable] and args[1] != "-c"
        self._forked &= subprocess.PIPE not in (options.get("stdout"), options.get("stderr"))
        super().__init__(args, *more, **options)

    def _execute_child(self, *given: Any) -> None:
        if not self._forked:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        words, cwd, environment, out, err = ([*given[0]], given[5], given[6], given[13], given[15])
        environment = dict(os.environ if environment is None else environment)
        ours, theirs = multiprocessing.Pipe()
        with ours, theirs:
            files = [theirs.fileno(), 1 if out == -1 else out, 2 if err == -1 else err]
            self.pid = self.nursery.fork(files).pid
            self._child_created = True
            folder = multiprocessing.util.get_temp_dir()
            ours.send((bytes(multiprocessing.current_process().authkey), folder, environment, cwd or os.getcwd()))
            ours.send((_python, ([str(w) for w in words[1:]], environment.get("PYTHONPATH", "")), False, False))
        self._close_pipe_fds(*given[10:16])  # type: ignore[attr-defined]


@contextmanager
def longest_file(nbytes: int):
    """What this process writes into a file beyond that fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
