"""Rank processes for the benchmarks: started fresh, joined on this machine, results by rank."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def run(
    nproc: int, function: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float | None = None,
    plugin: str | None = None,
) -> list[Any]:  # fmt: skip
    """Call a module-level function as ``function(rank, *args)`` on ``nproc`` new ranks.

    Args:
        backend: of the process group; with ``device:backend`` in it each rank uses a device of its own, if there are
            as many.
        plugin: a module that teaches torch a device type; see :func:`load`.
        timeout: seconds until all must have answered.

    Raises:
        RuntimeError: a rank raised, ended or did not answer in time; carries its traceback. The others are ended too.
    """
    end = None if timeout is None else time.monotonic() + timeout
    context = mp.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes: list[Connection] = []
    processes = []
    for rank in range(nproc):
        ours, theirs = context.Pipe(duplex=False)
        told = (theirs, rank, nproc, port, backend, plugin, function, args)
        process = context.Process(target=_rank, args=told, daemon=True)
        process.start()
        theirs.close()  # so that a rank that dies is read as an end of file
        pipes.append(ours)
        processes.append(process)
    results: list[Any] = [None] * nproc
    try:
        waiting = list(pipes)
        while waiting:
            answered = wait(waiting, None if end is None else max(0.0, end - time.monotonic()))
            if not answered:
                raise RuntimeError(f"{len(waiting)} of {nproc} ranks had not answered after {timeout:g} s")
            for pipe in answered:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                waiting.remove(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pipes[rank].recv()
                except EOFError:
                    good, value = False, "the process ended without a word"
                if not good:
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
    return results


def load(plugin: str | None) -> None:
    """Import a module that registers a device type with torch, and call its ``install()`` if it has one."""
    if plugin is not None:
        getattr(importlib.import_module(plugin), "install", lambda: None)()


def accelerator(plugin: str | None) -> str:
    """The type of this machine's accelerator, or of the one that a module registers. Without one the script ends."""
    from shardwise import device

    load(plugin)
    kind = device.accelerator()
    if kind is None:
        raise SystemExit("no accelerator here")
    return kind


def _rank(
    pipe: Connection, rank: int, nproc: int, port: int, backend: str, plugin: str | None,
    function: Callable[..., Any], args: Any,
) -> None:  # fmt: skip
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    if os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the peers' own, on every step
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // nproc))
    load(plugin)
    if backend != "gloo":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    try:
        dist.init_process_group(backend, rank=rank, world_size=nproc)
        value = function(rank, *args)
        dist.barrier()  # nobody closes connections that others still read
        pipe.send((True, value))
    except Exception:  # noqa: BLE001 - whatever it was, the parent reports it
        pipe.send((False, traceback.format_exc()))
