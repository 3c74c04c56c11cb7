"""What modules call: plain functions that find unit and schedules on the module, so that a copy of it finds its own.

``torch.compile`` is told to stay out of them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from shardwise.engine.binding import Installed, bind, binding_of
from shardwise.engine.engine import Engine
from shardwise.engine.forward import Forward
from shardwise.engine.uncompiled import uncompiled
from shardwise.engine.unit import Unit
from shardwise.events import failing

ENGINE = "_shardwise_engine"


def install(engine: Engine) -> None:
    """Have the modules drive the engine."""
    handle = engine.module.register_forward_pre_hook(_root_enters, prepend=True)
    engine.installed.append(Installed(engine.module, handle.id))
    for unit in engine.units:
        bind(unit, engine.forward, engine.backward)
    engine.backward.listen(hear)


def hear(unit: Unit) -> None:
    """Have the unit's module drive the engine when it runs."""
    if not unit.heard:
        unit.heard = True
        unit.module.register_forward_pre_hook(_enter, with_kwargs=True)
        unit.module.register_forward_hook(_leave, always_call=True)


def set_engine(module: nn.Module, engine: Engine) -> None:
    """The last step: a copy of the module copies its attributes in their order, and the engine must come last."""
    object.__setattr__(module, ENGINE, engine)


def engine_of(module: nn.Module) -> Engine | None:
    """The engine of a sharded module, also through a wrapper with ``.module``."""
    found = vars(module).get(ENGINE)
    if found is None:
        inner = getattr(module, "module", None) if not isinstance(module, nn.ModuleList) else None
        found = vars(inner).get(ENGINE) if isinstance(inner, nn.Module) else None
    return found


@uncompiled
def _root_enters(module: nn.Module, args: Any) -> None:
    engine: Engine = vars(module)[ENGINE]
    engine.before_forward()


@uncompiled
def _enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
    bound = binding_of(module)
    assert bound is not None
    if torch.is_grad_enabled():
        bound.backward.watch(bound.unit)
    return bound.forward.enter(bound.unit, args, kwargs)


@uncompiled
def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    bound = binding_of(module)
    assert bound is not None
    # Called with nothing, and inside of an exception's way up: the module's forward raised.
    error = sys.exc_info()[1] if output is None else None
    if error is not None:
        _say_where(bound.forward, error)
        failing(error)
    return bound.forward.leave(bound.unit, output, failed=error is not None)


def _say_where(forward: Forward, error: BaseException) -> None:
    """Units whose forwards nobody notices are found on the way that an exception took."""
    at = error.__traceback__
    while at is not None:
        module = at.tb_frame.f_locals.get("self")
        bound = binding_of(module) if isinstance(module, nn.Module) else None
        if bound is not None and bound.forward is forward:
            forward.tracker.unit = bound.unit.label
        at = at.tb_next
