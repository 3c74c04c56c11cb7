"""A pool of rank processes that lives for the whole test session: one spawn per world size, not per test.

``run(world, function, *args)`` calls a module-level function on every rank of a gloo process group and
returns the results by rank. A rank that raises, or does not answer in time, fails the test with every
rank's traceback; the pool of that size is then thrown away, since its ranks may disagree about what comes next.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_TIMEOUT = 90.0
_pools: dict[int, _Pool] = {}


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    pool = _pools.get(world)
    if pool is None:
        pool = _pools[world] = _Pool(world)
    return pool.run(function, args)


class _Pool:
    def __init__(self, world: int) -> None:
        self.world = world
        context = mp.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, port), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results: list[Any] = [None] * self.world
        problems: list[str] = []
        until = time.monotonic() + _TIMEOUT
        waiting = set(range(self.world))
        while waiting and time.monotonic() < until:
            for rank in sorted(waiting):
                if self.pipes[rank].poll(0.002):
                    waiting.discard(rank)
                    try:
                        ok, value = self.pipes[rank].recv()
                    except EOFError:
                        ok, value = False, "the process ended"
                    if ok:
                        results[rank] = value
                    else:
                        problems.append(f"--- rank {rank}\n{value}")
                        until = min(until, time.monotonic() + 5)
        if waiting:
            problems.append(f"--- no answer from ranks {sorted(waiting)}")
        if problems:
            self.close()
            raise AssertionError("\n".join(problems))
        return results

    def close(self) -> None:
        _pools.pop(self.world, None)
        for process in self.processes:
            process.kill()


@atexit.register
def close_all() -> None:
    for pool in list(_pools.values()):
        pool.close()


def _serve(pipe: Any, rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    import torch

    import shardwise

    torch.set_num_threads(1)
    if world > 1:
        shardwise.init("cpu", timeout=60)
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*args)))
        except BaseException:  # noqa: BLE001  (whatever it is, the test must hear of it)
            pipe.send((False, traceback.format_exc()))
