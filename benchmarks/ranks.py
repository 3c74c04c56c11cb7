"""Rank processes for the benchmarks: started fresh, joined over gloo on this machine, results by rank."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def run(nproc: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a module-level function as ``function(rank, *args)`` on ``nproc`` new ranks.

    Raises:
        RuntimeError: a rank raised or ended; carries that rank's traceback. The others are ended too.
    """
    context = mp.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes: list[Connection] = []
    processes = []
    for rank in range(nproc):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, nproc, port, function, args), daemon=True)
        process.start()
        theirs.close()  # so that a rank that dies is read as an end of file
        pipes.append(ours)
        processes.append(process)
    results: list[Any] = [None] * nproc
    try:
        waiting = list(pipes)
        while waiting:
            for pipe in wait(waiting):
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


def _rank(pipe: Connection, rank: int, nproc: int, port: int, function: Callable[..., Any], args: Any) -> None:
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
    try:
        dist.init_process_group("gloo", rank=rank, world_size=nproc)
        value = function(rank, *args)
        dist.barrier()  # nobody closes connections that others still read
        pipe.send((True, value))
    except Exception:  # noqa: BLE001 - whatever it was, the parent reports it
        pipe.send((False, traceback.format_exc()))
