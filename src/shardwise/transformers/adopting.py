"""Trainers of a script that was not changed: where ``import accelerate`` means Shardwise, so does theirs."""

from __future__ import annotations

from functools import wraps
from typing import Any

from shardwise.transformers.mixin import ShardwiseMixin

_adopted: dict[type, type] = {}


def adopt(module: Any) -> None:
    """From now on, every Trainer is one with :class:`ShardwiseMixin` before its class, from its first act on.

    Args:
        module: ``transformers.trainer``, whose names of Accelerate's are ours already.
    """
    trainer = module.Trainer
    theirs = trainer.create_accelerator_and_postprocess
    if hasattr(theirs, "__wrapped__"):
        return

    @wraps(theirs)
    def create_accelerator_and_postprocess(self: Any) -> None:
        self.__class__ = with_mixin(type(self))
        self.create_accelerator_and_postprocess()

    trainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess


def with_mixin(kind: type) -> type:
    """A class of trainers with the mixin before it, under its own name."""
    if issubclass(kind, ShardwiseMixin):
        return kind
    if kind not in _adopted:
        own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _adopted[kind] = type(kind.__name__, (ShardwiseMixin, kind), own)
    return _adopted[kind]
