"""Noticing that a backward has begun which the engine did not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardwise.trees import map_tensors


def watch(output: Any, begins: Callable[[], None]) -> None:
    """Call ``begins`` once per backward that comes to one of these tensors.

    Args:
        output: what a model returned, a nest of tensors.
        begins: may raise; then ``loss.backward()`` raises that.
    """
    seen: list[int] = []

    def look(grad: torch.Tensor) -> None:
        now = torch._C._current_graph_task_id()
        if now not in seen:
            seen[:] = [now]
            begins()

    def add(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad:
            tensor.register_hook(look)
        return tensor

    map_tensors(output, add)
