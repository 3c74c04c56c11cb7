"""Where the tests' processes come from: interpreters that have done the imports, and fork when they are told to.

See processes.py, which is the one that tests ask. Where several processes share the tests, each one's servers are forks
of two interpreters that belong to all of them (:class:`Nest`): the imports take most of their time.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import multiprocessing
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

_PRELOAD = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "shardwise.accelerator", "shardwise.cli.ranks",
    "pytest", "hypothesis", "torch._inductor.pattern_matcher", "torch._dynamo.backends.common",
    "rich.console", "rich.progress",
)  # fmt: skip
_PRIVATE = ("typer._adapters",)  # of some versions
_LIBRARIES = (
    "transformers.trainer", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.t5.modeling_t5", "peft",
)  # fmt: skip
_START_S = 150.0  # the imports, on a machine that does much else
_REQUEST = struct.Struct("=cq")  # b"f": fork (three file descriptors come along), b"p": how did this process end?
_REPLY = struct.Struct("=q")
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_RUNNING = 1 << 32  # no exit code


RICH = "-rich"


class Nest:
    """A process that has done the imports, and forks a server for everyone who connects to it. It ends when this one
    does, and the servers with whoever has connected.

    Beside it there is one that has imported transformers and others, too: the ranks of pools come from there, which
    serve all tests in turn. Whatever else is forked begins without them, as the scripts that it runs expect.

    Args:
        address: of its socket, a file; with :data:`RICH` behind it that of the one beside it.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._control, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX) as visitors, socket.socket(socket.AF_UNIX) as rich:
            for door, name in ((visitors, address), (rich, address + RICH)):
                door.bind(name)
                door.listen()
            self._process = _started("_nest", theirs, visitors, rich)
        atexit.register(self._close)

    def _close(self) -> None:
        self._control.close()
        self._process.wait(timeout=_START_S)  # it does not look before it has imported all


def _started(function: str, *sockets: socket.socket) -> subprocess.Popen[bytes]:
    files = [s.fileno() for s in sockets]
    return subprocess.Popen(
        [sys.executable, "-c", f"import process_servers; process_servers.{function}(*{files})"],
        pass_fds=files, start_new_session=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip


class Server:
    """A process that has done the imports. It ends, with all it has forked, when this one does.

    Args:
        nest: the address of the one that forks it; it is started anew without.
    """

    def __init__(self, nest: str | None = None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if nest is None:
            self.control, theirs = socket.socketpair()
            with theirs:
                self._process = _started("_serve", theirs)
        else:
            self.control = socket.socket(socket.AF_UNIX)
            self.control.connect(nest)
        self.control.settimeout(_START_S)
        atexit.register(self.close)

    def fork(self, files: list[int]) -> Forked:
        socket.send_fds(self.control, [_REQUEST.pack(b"f", 0)], files)
        return Forked(self, self._reply())

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
        if self._process is not None:
            self._process.wait(timeout=30)


class Forked:
    def __init__(self, server: Server, pid: int) -> None:
        self.pid, self._server = pid, server
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._server.ask(self.pid)
        return self._code


def _serve(control: int) -> None:
    """The life of a server. Returns in what it has forked only, when that has done its work."""
    _prepare()
    _answer(socket.socket(fileno=control))


def _nest(control: int, visitors: int, rich: int) -> None:
    """The life of a nest. Returns in what its servers have forked only, when that has done its work."""
    _prepare()
    if not os.fork():  # the one beside it
        os.close(visitors)
        visitors = rich
        gc.disable()
        _import_what_there_is(_LIBRARIES)
        gc.freeze()
        gc.enable()
    else:
        os.close(rich)
    with socket.socket(fileno=control) as owner, socket.socket(fileno=visitors) as door:
        while True:
            ready, _, _ = select.select([owner, door], [], [])
            if owner in ready:
                os._exit(0)
            visitor = door.accept()[0]
            if not os.fork():
                break
            visitor.close()
    os.setsid()
    _answer(visitor)


def _prepare() -> None:
    gc.disable()  # what is imported is no garbage
    for name in _PRELOAD:
        importlib.import_module(name)
    _import_what_there_is(_PRIVATE)
    gc.collect()
    gc.freeze()  # collections in the children leave these pages shared
    gc.enable()


def _import_what_there_is(names: Iterable[str]) -> None:
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


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


def script(path: Path, args: list[str]) -> None:
    sys.argv = [str(path), *args]
    sys.path[0] = str(path.parent)
    main = vars(sys.modules["__main__"])
    main["__file__"] = str(path)
    exec(compile(path.read_text(), str(path), "exec"), main)


def module(name: str, args: list[str]) -> None:
    sys.argv = [name, *args]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


# --- processes that start interpreters ----------------------------------------------------------
def nursing_module(name: str, args: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    if sys.platform == "linux":  # elsewhere nobody adopts the children of another
        _Popen.nursery = _Nursery()
        subprocess.Popen = subprocess_handler.Popen = _Popen  # type: ignore[misc,assignment]
    # It looks at the whole stack nine times, for a log that nobody keeps: most of what a launch costs in a process with
    # so many modules.
    dynamic_rendezvous.get_method_name = lambda depth=2: ""  # type: ignore[assignment]
    module(name, args)


def _python(words: list[str], paths: str) -> None:
    """What ``python`` with these words does."""
    sys.stdout.reconfigure(write_through="-u" in words[:1])  # type: ignore[union-attr]
    words = words[words[0] == "-u" :]
    sys.path[1:1] = [path for path in paths.split(os.pathsep) if path and path not in sys.path]
    if words[0] != "-m":
        script(Path(words[0]).absolute(), words[1:])
    elif words[1] == "shardwise":
        nursing_module(words[1], words[2:])
    else:
        module(words[1], words[2:])


class _Nursery(Server):
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
