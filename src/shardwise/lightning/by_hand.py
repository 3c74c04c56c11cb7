"""Manual optimization: a step calls parts of the module, runs backwards and steps optimizers, and is no forward itself.

So each part that it may call is a unit, and what the module holds beside its parts is always here.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shardwise.engine.manual import keep, unshard
from shardwise.engine.select import UnitRule, has_forward, select_units
from shardwise.engine.unit import unit_of


def units(module: nn.Module, rule: UnitRule) -> UnitRule:
    """What a rule of units chooses, and the outermost parts of the module that can be called."""
    wanted = {id(unit) for _, unit in select_units(module, rule)} | {id(part) for part in _parts(module)}
    return (lambda name, child: id(child) in wanted) if wanted else None


def keep_own_values(module: nn.Module) -> None:
    """What a sharded module holds itself, beside its parts, stays whole on every rank."""
    own = [unit for p in module.parameters(recurse=False) if (unit := unit_of(p)) is not None]
    found = list(dict.fromkeys(own))
    keep(found, after_backward=True)
    unshard(found)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside that can be called and hold parameters."""
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if has_forward(child):
            yield child
        else:
            yield from _parts(child)
