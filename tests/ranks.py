"""A pool of rank processes that lives for the whole test session: one start per world size, not per test.

``run(world, function, *args)`` calls a module-level function on every rank of a gloo process group and
returns the results by rank. A rank that raises, or does not answer in time, fails the test with every
rank's traceback; the pool of that size is then thrown away, since its ranks may disagree about what comes next.

With ``device="sim"`` the ranks have a simulated accelerator, ``sim:0`` is theirs, and a function during which two
operations raced there fails its test (see simulated_device/README.md).

With ``LATE`` in the environment, what ranks receive over gloo is not there before they wait for it: however quick the
network, who forgets to wait reads rubbish.

With ``fresh=True`` the ranks are new and end with the function: their memory holds nothing that ran before.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import processes

LATE = "SHARDWISE_TESTS_LATE"
_TIMEOUT = 120.0
_pools: dict[tuple[str, int], _Pool] = {}


def run(world: int, function: Callable[..., Any], *args: Any, device: str = "cpu", fresh: bool = False) -> list[Any]:
    if fresh:
        pool = _Pool(device, world, fresh)
        try:
            return pool.run(function, args)
        finally:
            pool.close()
    pool = _pools.get((device, world))
    if pool is None:
        pool = _pools[device, world] = _Pool(device, world)
    return pool.run(function, args)


def everywhere(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """:func:`run`; a single rank is this process, which has imported already what the function needs."""
    return [function(*args)] if world == 1 else run(world, function, *args)


class _Pool:
    def __init__(self, device: str, world: int, fresh: bool = False) -> None:
        self.device, self.world = device, world
        port = processes.free_port()
        self.pipes: list[Any] = []
        self.processes: list[processes.Process] = []
        for rank in range(world):
            process, pipe = processes.fork(
                _serve, device, rank, world, port, number=rank, connected=True, rich=not fresh
            )
            processes.keep(process)
            self.pipes.append(pipe)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self._signal(signal.SIGCONT)
        results: list[Any] = [None] * self.world
        problems: list[str] = []
        until = time.monotonic() + _TIMEOUT
        waiting = dict(zip(self.pipes, range(self.world), strict=True))
        for pipe in self.pipes:
            try:
                pipe.send((function, args))
            except BrokenPipeError:  # it has ended, and is found to have below
                continue
        while waiting and time.monotonic() < until:
            for pipe in wait(list(waiting), timeout=0.5):
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    ok, value = False, f"the process ended\n{self.processes[rank].err[-9000:]}"
                if ok:
                    results[rank] = value
                else:
                    problems.append(f"--- rank {rank}\n{value}")
                    until = min(until, time.monotonic() + 5)
        if waiting:
            problems.append(f"--- no answer from ranks {sorted(waiting.values())}")
        if problems:
            self.close()
            raise AssertionError("\n".join(problems))
        self._signal(signal.SIGSTOP)  # each of gloo's threads wakes up a hundred times a second, to find nothing
        return results

    def _signal(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def close(self) -> None:
        if _pools.get((self.device, self.world)) is self:
            del _pools[self.device, self.world]
        for process in self.processes:
            process.kill()
        for pipe in self.pipes:
            pipe.close()


@atexit.register
def close_all() -> None:
    for pool in list(_pools.values()):
        pool.close()


def _serve(pipe: Any, device: str, rank: int, world: int, port: int) -> None:
    environment = processes.rank_environment(rank, world, port)
    os.environ.update(environment)
    faulthandler.enable()  # who is ended by a signal says where it was
    import torch

    import shardwise

    torch.set_num_threads(1)
    processes.collect_rarely()
    if device == "sim":
        import simulated_device

        simulated_device.install().configure(check="count")
    if LATE in os.environ:
        _receive_late()
    if world > 1 or device != "cpu":
        shardwise.init("cpu" if device == "cpu" else f"{device}:0", timeout=60)
    threads = 0
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            os._exit(0)
        if len(os.listdir("/proc/self/task")) != threads:
            threads = _let_threads_of_gloo_wait()
        try:
            os.environ.update(environment)  # Lightning takes some of it away
            torch.manual_seed(0)
            if device == "sim":
                torch.accelerator.set_device_index(0)
            value = function(*args)
            if device == "sim":
                _assert_no_races()
            if world == 1 and device == "cpu" and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # the next test begins without one, as a script does
            pipe.send((True, value))
        except BaseException:  # noqa: BLE001  (whatever it is, the test must hear of it)
            pipe.send((False, traceback.format_exc()))


def _let_threads_of_gloo_wait() -> int:
    """How many threads there are.

    A rank sends while it holds the lock of a connection, and the thread that receives asks for this lock again and
    again. If the thread of another rank takes the sender's core in this moment, both cores are busy with nothing until
    the sender's turn comes: a tenth of all that the tests took. What has a low priority takes no other's core.
    """
    tasks = list(Path("/proc/self/task").iterdir())
    for task in tasks:
        with suppress(OSError):  # it has ended
            if (task / "comm").read_text() == "gloo_tcp_loop\n":
                os.setpriority(os.PRIO_PROCESS, int(task.name), 19)
    return len(tasks)


class _LateWork:
    """A receive whose values come into ``target`` when somebody waits."""

    def __init__(self, work: Any, arrived: Any, target: Any) -> None:
        self.work, self.arrived, self.target = work, arrived, target

    def wait(self) -> None:
        self.work.wait()
        if self.target is not None:
            self.target.copy_(self.arrived)
            self.target = None


def _receive_late() -> None:
    import torch

    from shardwise.comm.group import Group

    exchange = Group.start_exchange

    def late(self: Group, sends: Any, recvs: Any, tag: int) -> list[Any]:
        arriving = [(torch.empty_like(t), r) for t, r in recvs]
        with torch.no_grad():
            for target, _ in recvs:
                target.view(torch.uint8).fill_(0xFF)
            works = exchange(self, sends, arriving, tag)
        received = [_LateWork(w, a, t) for w, (a, _), (t, _) in zip(works, arriving, recvs, strict=False)]
        return [*received, *works[len(recvs) :]]

    Group.start_exchange = late  # type: ignore[method-assign]


def _assert_no_races() -> None:
    import torch

    races = torch.sim.races()
    torch.sim.forget_races()
    assert not races, "\n".join([f"{len(races)} races, the first:", *races[:5]])
