"""Marks for profilers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def instrument_w_nvtx(func: _Function) -> _Function:
    """Show calls of a function under its name in torch's profiler, and in what listens to it."""

    @functools.wraps(func)
    def marked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        with torch.profiler.record_function(func.__qualname__):
            return func(*args, **kwargs)

    return marked  # type: ignore[return-value]
