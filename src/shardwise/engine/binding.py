"""What a module of a sharded model carries: its unit and the schedules that drive it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from shardwise.engine.backward import Backward
from shardwise.engine.forward import Forward
from shardwise.engine.unit import Slot, Unit
from shardwise.errors import UnitError

_BINDING = "_shardwise_binding"
_OWNED = "_shardwise_slots"


class Binding:
    """On a unit's module.

    A copy of the module gets an empty one, which the copy of the model's engine fills: it comes after all modules.
    """

    __slots__ = ("backward", "forward", "unit")

    def __init__(self, unit: Unit, forward: Forward, backward: Backward) -> None:
        self.unit, self.forward, self.backward = unit, forward, backward

    def __deepcopy__(self, memo: Any) -> Any:
        if not self.unit.is_copied(memo):
            raise UnitError(
                "a part of a sharded module cannot be copied by itself: its values are spread over the ranks",
                where=f"unit {self.unit.label}",
                fix="copy the whole model, or copy the part before the model is sharded",
            )
        new = memo[id(self)] = object.__new__(Binding)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnitError("a sharded module cannot be pickled", fix="save model.state_dict() instead")


class Owned(dict[str, Slot]):
    """On a module that holds parameters: their slots, by the attribute's name. Copied as :class:`Binding` is."""

    def __deepcopy__(self, memo: Any) -> Any:
        new = memo[id(self)] = Owned()
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnitError("a sharded module cannot be pickled", fix="save model.state_dict() instead")


class Installed(NamedTuple):
    """A hook before a module's forward, by the key of torch's own table, which survives a copy of the module."""

    module: nn.Module
    key: int

    def remove(self) -> None:
        """Take it off."""
        self.module._forward_pre_hooks.pop(self.key, None)
        self.module._forward_pre_hooks_with_kwargs.pop(self.key, None)


def binding_of(module: nn.Module) -> Binding | None:
    """What a unit's module is bound to."""
    return vars(module).get(_BINDING)


def bind(unit: Unit, forward: Forward, backward: Backward) -> None:
    """Have a unit's module know it."""
    old = binding_of(unit.module)
    if old is not None:  # the parent's engine has taken over the unit
        old.unit, old.forward, old.backward = unit, forward, backward
    else:
        object.__setattr__(unit.module, _BINDING, Binding(unit, forward, backward))


def owned_by(module: nn.Module) -> Owned:
    """The slots of a module's own parameters."""
    found: Owned | None = vars(module).get(_OWNED)
    if found is None:
        found = Owned()
        object.__setattr__(module, _OWNED, found)
    return found


def copy_bindings(old: Unit, new: Unit, forward: Forward, backward: Backward, memo: Any) -> None:
    """Fill what the copies of a unit's modules carry."""
    bound = binding_of(old.module)
    if bound is not None:
        twin: Binding = memo[id(bound)]
        twin.unit, twin.forward, twin.backward = new, forward, backward
    for before, slot in zip(old.slots, new.slots, strict=True):
        for module, name in before.holders:
            memo[id(owned_by(module))][name] = slot
