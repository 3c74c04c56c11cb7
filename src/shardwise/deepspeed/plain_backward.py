"""Noticing that a backward has begun which the engine did not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import Variable

from shardwise.trees import map_tensors

_running = 0  # backwards of engines; one may go through the models of several


@contextmanager
def scaled_backward() -> Iterator[None]:
    """Around a backward that an engine runs."""
    global _running
    _running += 1
    try:
        yield
    finally:
        _running -= 1


def watch(output: Any, begins: Callable[[], None], ends: Callable[[], None]) -> None:
    """Hear of each backward that comes to one of these tensors and is run by no engine.

    Args:
        output: what a model returned, a nest of tensors.
        begins: called once per backward. May raise; then ``loss.backward()`` raises that.
        ends: called when it is over, and its gradients are reduced.
    """
    seen: list[int] = []

    def look(grad: torch.Tensor) -> None:
        if _running:
            return
        now = torch._C._current_graph_task_id()
        if now not in seen:
            seen[:] = [now]
            begins()
            # The second time round, everybody who asked for the end of this backward has been called.
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(ends))

    def add(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad:
            tensor.register_hook(look)
        return tensor

    map_tensors(output, add)
