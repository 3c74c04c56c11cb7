"""Processes that measure together what a machine's ranks do to each other."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from shardwise.errors import PlanError

_TIMEOUT_S = 300.0


def run(ranks: int, threads: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` in new processes of one gloo process group; what they return, by rank.

    Args:
        ranks, threads: processes, and threads of each.
        function: of a module. It and its arguments are pickled.

    Raises:
        PlanError: a process failed, or had not ended after five minutes. The others are ended, too.
    """
    with tempfile.TemporaryDirectory(prefix="shardwise-calibration-") as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(ranks):
            pipe, process = _started(rank, ranks, threads, str(Path(folder) / "store"), function, args)
            pipes.append(pipe)
            processes.append(process)
        try:
            return [_answer(pipe, rank) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(2)
                process.kill()
                process.join()


def _started(*told: Any) -> tuple[Connection, BaseProcess]:
    """A process for :func:`_rank`, and where its answer comes from."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_rank, args=(theirs, *told), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of what can be read
    return ours, process


def _answer(pipe: Connection, rank: int) -> Any:
    try:
        good, value = pipe.recv() if pipe.poll(_TIMEOUT_S) else (False, "it did not answer")
    except EOFError:
        good, value = False, "its process ended"
    if not good:
        raise PlanError(f"measuring failed on rank {rank}: {value}", fix="plan without what is measured")
    return value


def _rank(
    pipe: Connection, rank: int, ranks: int, threads: int, store: str, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # values that shrink from call to call must not slow a call down
    try:
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        value = function(rank, *args)
        if ranks > 1:
            dist.barrier()  # nobody closes connections that others still read
        pipe.send((True, value))
    except Exception:  # noqa: BLE001 - whatever it was, who asked has to hear of it
        pipe.send((False, traceback.format_exc()))
