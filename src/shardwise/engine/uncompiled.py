"""Keep ``torch.compile`` out of the engine's functions, without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """What ``torch.compiler.disable`` does, which imports the compiler: two seconds of every start of every rank.

    A call of ``function`` breaks the graph, and it and whatever it calls run as they are written.
    """
    return _marked(function, below=_FrameAction.SKIP)


def uncompiled_itself(function: _Function) -> _Function:
    """The same for ``function`` alone: what it calls may be compiled."""
    return _marked(function, below=_FrameAction.DEFAULT)


def _marked(function: _Function, *, below: _FrameAction) -> _Function:
    assert isinstance(function, FunctionType)
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, below))  # where it is called as is
    marks: Any = function
    marks._torchdynamo_disable = True  # where a call of it is traced
    marks._torchdynamo_disable_msg = "the engine moves and sends what a graph cannot hold"
    return function
