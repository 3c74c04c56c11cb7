"""What a script does by hand that the schedules do by themselves: bring values, keep them, run a method as a forward.

All of it is about some units of a model. Every rank does it alike, as ever where values are split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shardwise.engine.binding import binding_of
from shardwise.engine.engine import Engine
from shardwise.engine.residency import Pin
from shardwise.engine.uncompiled import uncompiled
from shardwise.engine.unit import Unit, unit_of

_MANUAL = "_shardwise_manual"


@dataclass
class _Manual:
    """On the module of a unit that a script has handled.

    Attributes:
        unsharded: ``unshard()`` holds the values, until the next forward.
        keep_for_backward: a forward leaves them here for its backward.
        keep_after_backward: and the backward for the next forward.
    """

    unsharded: bool = False
    keep_for_backward: bool = False
    keep_after_backward: bool = False

    def __deepcopy__(self, memo: Any) -> _Manual:
        return replace(self, unsharded=False)  # nobody holds the values of a copied model


def engine_around(module: nn.Module) -> Engine | None:
    """The engine that a module of a sharded model belongs to; ``None`` where it has no parameters in one."""
    found = next((unit for p in module.parameters() if (unit := unit_of(p)) is not None), None)
    return found.upward if found is not None and isinstance(found.upward, Engine) else None


def units_in(module: nn.Module, stop: Callable[[nn.Module], bool] = lambda _: False) -> list[Unit]:
    """The units whose modules are in a module, in the engine's order.

    Args:
        stop: do not look into these modules.
    """
    engine = engine_around(module)
    inside: set[int] = set()
    stack = [module]
    while stack:
        at = stack.pop()
        inside.add(id(at))
        stack += [child for child in at.children() if not stop(child)]
    return [] if engine is None else [unit for unit in engine.units if id(unit.module) in inside]


def start_unshard(units: Iterable[Unit]) -> None:
    """Begin to bring values. They stay until :func:`reshard`, or until their unit's next forward is over."""
    for unit in units:
        if unit.released:
            manual = _manual_of(unit)
            if not manual.unsharded:
                manual.unsharded = True
                unit.residence.pin(Pin.USER)
            unit.start_gather()


def unshard(units: Iterable[Unit]) -> None:
    """Have values here. They stay until :func:`reshard`, or until their unit's next forward is over."""
    units = list(units)
    start_unshard(units)
    for unit in units:
        unit.gather()
        unit.watch()


def reshard(units: Iterable[Unit]) -> None:
    """Let values go, but for those that a pass that is under way, or a block around this, needs."""
    for unit in units:
        if not unit.released:
            continue
        _let_go(unit)
        engine = unit.upward
        if isinstance(engine, Engine) and not engine.passes.active:
            unit.rest()
        else:
            unit.release()


def keep(units: Iterable[Unit], *, for_backward: bool | None = None, after_backward: bool | None = None) -> None:
    """Change what forwards and backwards leave gathered. ``None``: as it was."""
    for unit in units:
        if unit.released:
            manual = _manual_of(unit)
            manual.keep_for_backward = manual.keep_for_backward if for_backward is None else for_backward
            manual.keep_after_backward = manual.keep_after_backward if after_backward is None else after_backward


def run_as_forward(module: nn.Module, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``method(*args, **kwargs)`` with the module's values here, as a forward of the module would have them."""
    bound = binding_of(module)
    if bound is None:
        return method(*args, **kwargs)
    unit, forward = bound.unit, bound.forward
    if isinstance(unit.upward, Engine) and unit.upward.module is module:
        unit.upward.before_forward()
    if torch.is_grad_enabled():
        bound.backward.watch(unit)
    changed = forward.enter(unit, args, kwargs)
    args, kwargs = (args, kwargs) if changed is None else changed
    if _MANUAL in vars(module):
        _before_forward(module, args)
    output = None
    unit.residence.pin(Pin.USER)  # also behind a forward of the module inside the method
    try:
        output = method(*args, **kwargs)
    finally:
        unit.residence.unpin(Pin.USER)
        changed = forward.leave(unit, output)
    return output if changed is None else changed


def _manual_of(unit: Unit) -> _Manual:
    found: _Manual | None = vars(unit.module).get(_MANUAL)
    if found is None:
        found = _Manual()
        object.__setattr__(unit.module, _MANUAL, found)
        unit.module.register_forward_pre_hook(_before_forward)  # behind the engine's: the values are here
    return found


def _let_go(unit: Unit) -> None:
    manual: _Manual | None = vars(unit.module).get(_MANUAL)
    if manual is not None and manual.unsharded:
        manual.unsharded = False
        unit.residence.unpin(Pin.USER)


@uncompiled
def _before_forward(module: nn.Module, args: Any) -> None:
    bound = binding_of(module)
    if bound is None:
        return
    unit, manual = bound.unit, _manual_of(bound.unit)
    if manual.keep_after_backward:
        if not manual.unsharded:
            manual.unsharded = True
            unit.residence.pin(Pin.USER)
        return
    _let_go(unit)
    if manual.keep_for_backward and not bound.forward.passes.backward and not unit.residence.pinned(Pin.BACKWARD):
        unit.residence.pin(Pin.BACKWARD)
