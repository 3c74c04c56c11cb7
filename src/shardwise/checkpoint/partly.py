"""A model that was loaded in part is not used by mistake: it neither runs nor is saved before a load is complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from shardwise.errors import CheckpointError

_MARK = "_shardwise_partly_loaded"


class _Refuse:
    """A hook before the forward."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        raise CheckpointError(
            f"{type(module).__name__} has values of a checkpoint that could not be loaded to its end",
            where=str(self.path),
            fix="load a whole one into it, or build it anew",
        )


def refuse(module: nn.Module) -> None:
    """Raise if a model was loaded in part."""
    if _MARK in vars(module):
        vars(module)[_MARK][0](module, ())


@contextmanager
def loading(modules: Sequence[nn.Module], path: Path) -> Iterator[None]:
    """Values of models change inside the block: all of them, or they are marked. All ranks leave it alike."""
    try:
        yield
    except BaseException:
        for module in modules:
            if _MARK not in vars(module):
                hook = _Refuse(path)
                object.__setattr__(module, _MARK, (hook, module.register_forward_pre_hook(hook, prepend=True)))
        raise
    for module in modules:
        if _MARK in vars(module):
            vars(module)[_MARK][1].remove()
            object.__delattr__(module, _MARK)
