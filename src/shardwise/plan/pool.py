"""Predictions of many strategies, by as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from shardwise.errors import PlanError, ShardwiseError

T = TypeVar("T")
_work: Callable[[Any], Any] | None = None  # of a worker: set before it is forked, so that nothing is pickled


def _do(item: Any) -> Any:
    assert _work is not None
    try:
        return _work(item)
    except ShardwiseError as error:
        return error


def each(work: Callable[[Any], T], items: Sequence[Any], processes: int | None = None) -> Iterator[T | ShardwiseError]:
    """Do something with each item, several at a time where processes can be forked; results in the items' order.

    What raises a :class:`ShardwiseError` gives that error as its result.

    Args:
        work: what it returns must be picklable.
        processes: by default one per core.
    """
    global _work
    count = min(processes or os.cpu_count() or 1, len(items))
    before, _work = _work, work
    try:
        if count < 2 or "fork" not in multiprocessing.get_all_start_methods() or torch.accelerator.is_available():
            yield from map(_do, items)
            return
        with _one_thread(), ProcessPoolExecutor(count, multiprocessing.get_context("fork")) as pool:
            try:
                yield from pool.map(_do, items)
            except BrokenProcessPool as error:
                raise PlanError("a process that simulated a step ended", fix="look at what it printed") from error
    finally:
        _work = before


@contextmanager
def _one_thread() -> Iterator[None]:
    """A forked process has no threads of its parent's, and no use for any."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
