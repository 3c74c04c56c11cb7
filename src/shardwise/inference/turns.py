"""What holds in every forward of a model whose weights come and go: one thread at a time, and nobody trains them."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from shardwise.engine.binding import binding_of
from shardwise.engine.engine import Engine
from shardwise.engine.forward import Forward
from shardwise.engine.uncompiled import uncompiled
from shardwise.errors import UnitError


class _Turn(threading.local):
    """Modules whose forward this thread is in, one inside of the other, with a turn each."""

    def __init__(self) -> None:
        self.inside: list[nn.Module] = []


_turn = _Turn()
_locks: WeakKeyDictionary[Forward, threading.RLock] = WeakKeyDictionary()  # of each model; a copy has its own
_making = threading.Lock()


def take_turns(engine: Engine) -> None:
    """Let threads that call a model, or parts of it, wait for each other: its weights are in one place at a time.

    A model whose weights all stay where they are needs nothing of this.

    Cost: two calls of Python for each unit that comes and goes.
    """
    if all(b.placement.settled for unit in engine.units for b in unit.buckets):
        return
    for unit in engine.units:
        if not unit.settled or unit.module is engine.module:
            unit.module.register_forward_pre_hook(_enter, prepend=True)
            unit.module.register_forward_hook(_leave, always_call=True)


def _lock_of(module: nn.Module) -> threading.RLock | None:
    bound = binding_of(module)
    if bound is None:
        return None
    found = _locks.get(bound.forward)
    if found is None:
        with _making:
            found = _locks.setdefault(bound.forward, threading.RLock())
    return found


@uncompiled
def _enter(module: nn.Module, args: Any) -> None:
    lock = _lock_of(module)
    if lock is None:
        return
    lock.acquire()
    _turn.inside.append(module)
    if torch.is_grad_enabled():
        _refuse_training(module)


@uncompiled
def _leave(module: nn.Module, args: Any, output: Any) -> None:
    lock = _lock_of(module)
    if lock is not None and _turn.inside and _turn.inside[-1] is module:  # else another hook failed before the turn
        _turn.inside.pop()
        lock.release()


def _refuse_training(module: nn.Module) -> None:
    bound = binding_of(module)
    assert bound is not None
    with torch._C.DisableTorchFunctionSubclass():
        wanted = next((slot for slot in bound.unit.slots if slot.param.requires_grad), None)
    if wanted is not None:
        raise UnitError(
            f"'{wanted.names[0]}' was told to require a gradient, and its values are weights of files",
            where=f"unit {bound.unit.label}",
            fix="leave it frozen and train what you add to it (adapters), or train with fully_shard or the Accelerator",
        )
