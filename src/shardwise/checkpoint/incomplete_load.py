"""A model that was loaded in part is not used by mistake: it neither runs nor is saved before a load is complete.

The mark is that of an update that failed (:mod:`shardwise.engine.failure`). The units of a sharded model carry it; of
other modules, a hook before the forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shardwise.engine.attachment import attachment_of
from shardwise.engine.failure import Failure, Fallible, Recovery, recovering, require_valid
from shardwise.engine.state_dict import units_of
from shardwise.errors import CheckpointError

_MARK = "_shardwise_partly_loaded"


class _Refuse:
    """A hook before the forward of a module."""

    def __init__(self, failure: Failure) -> None:
        self.failure: Failure | None = failure

    def __call__(self, module: nn.Module, args: Any) -> None:
        require_valid(self)


def refuse_incomplete(module: nn.Module) -> None:
    """Raise if a model was loaded in part, or an update of it failed."""
    require_valid(*units_of(module))
    if _MARK in vars(module):
        require_valid(vars(module)[_MARK][0])


@contextmanager
def recovery(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer] = ()) -> Iterator[Recovery]:
    """Around a load that replaces what these have: an update of them that failed does not stand in its way.

    Marks come back if it ends in an exception, or without having said that it is ``complete``.
    """
    units = [unit for module in modules if isinstance(module, nn.Module) for unit in units_of(module)]
    for engine in {id(unit.upward): unit.upward for unit in units}.values():
        engine.recover()
    for unit in units:
        unit.drain()
    found = [attachment_of(optimizer) for optimizer in optimizers if isinstance(optimizer, Optimizer)]
    records = [record for record in found if record is not None]
    holders: list[Fallible] = [*units, *records]
    with recovering(holders) as recovered:
        yield recovered


@contextmanager
def incomplete_on_error(modules: Sequence[nn.Module], path: Path) -> Iterator[None]:
    """Values of models change inside the block: all of them, or they are marked. All ranks leave it alike."""
    try:
        yield
    except BaseException:
        for module in modules:
            failure = Failure(
                f"{type(module).__name__} has values of a checkpoint that could not be loaded to its end",
                str(path),
                "load a whole one into it, or build it anew",
                CheckpointError,
            )
            for unit in units_of(module):
                unit.fail(failure)
            if _MARK not in vars(module):
                hook = _Refuse(failure)
                object.__setattr__(module, _MARK, (hook, module.register_forward_pre_hook(hook, prepend=True)))
        raise
    for module in modules:
        if _MARK in vars(module):
            vars(module)[_MARK][1].remove()
            object.__delattr__(module, _MARK)
