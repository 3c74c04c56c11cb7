"""Leaf modules: subtrees whose values come and go together, such as the experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from shardwise.engine.parked import parked_in
from shardwise.engine.select import Chosen, has_forward, select_units
from shardwise.engine.unit import unit_of
from shardwise.errors import UnitError

LEAF = "_z3_leaf"  # marks modules that a script made leaves
Kinds = type[nn.Module] | str


def z3_leaf_module(model: nn.Module) -> bool:
    """Is this module a leaf?"""
    return bool(getattr(model, LEAF, False))


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Does a parameter of a sharded model belong to a leaf?"""
    unit = unit_of(model)
    if unit is None:
        return False
    inside = [m for m in unit.module.modules() if z3_leaf_module(m)]
    return unit.module in inside or any(p is model for m in inside for p in m.parameters())


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """All leaves in a model."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Make this module a leaf, or none."""
    if flag:
        _refuse_late([model])
    setattr(model, LEAF, flag)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Kinds], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Make the modules of some classes leaves: each is a unit, with all that is in it.

    Args:
        model: which is not sharded yet.
        leaf_module_classes: classes, or their names (``Experts`` or ``package.module.Experts``).
        raise_if_not_found: is it an error if there are none?

    Returns:
        Those modules.

    Raises:
        UnitError: there are none, or the model is sharded.
    """
    return _set(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Kinds], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Undo :func:`set_z3_leaf_modules` for some classes."""
    return _set(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Make modules leaves, or none, by their names in ``model.named_modules()``; returns them, and names of none."""
    return _by_name(model, list(module_names), flag, raise_if_not_found, lambda name, wanted: name == wanted)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """The same by the ends of their names."""
    return _by_name(model, list(module_name_suffixes), flag, raise_if_not_found, str.endswith)


def apply_leaf_config(model: nn.Module, section: Mapping[str, Any] | None) -> list[nn.Module]:
    """What ``zero_optimization.leaf_module`` says: ``classes``, ``names`` and ``name_suffixes``.

    Raises:
        UnitError: one of them matches nothing.
    """
    section = section or {}
    found = set_z3_leaf_modules(model, section["classes"]) if section.get("classes") else []
    if section.get("names"):
        found += set_z3_leaf_modules_by_name(model, section["names"])[0]
    if section.get("name_suffixes"):
        found += set_z3_leaf_modules_by_suffix(model, section["name_suffixes"])[0]
    return list(dict.fromkeys(found))


def leaf_units(model: nn.Module) -> Chosen | None:
    """Units of a model with leaves: the default, with each leaf a unit and none inside it.

    A leaf without a forward, such as a ``ModuleList`` of experts, belongs to the unit around it. ``None`` where there
    are no leaves.
    """
    leaves = [m for m in get_z3_leaf_modules(model) if next(m.parameters(), None) is not None]
    outer = [m for m in leaves if not any(m is not o and _is_in(m, o) for o in leaves)]
    if not outer:
        return None
    inside = {id(m) for leaf in outer for m in leaf.modules()}
    wanted = [id(m) for _, m in select_units(model) if id(m) not in inside]
    return Chosen(wanted + [id(m) for m in outer if has_forward(m)])


def _is_in(module: nn.Module, other: nn.Module) -> bool:
    return any(module is inner for inner in other.modules())


def _set(model: nn.Module, kinds: Iterable[Kinds], flag: bool, must: bool) -> list[nn.Module]:
    kinds = [kinds] if isinstance(kinds, (str, type)) else list(kinds)
    if odd := next((kind for kind in kinds if not isinstance(kind, (str, type))), None):
        raise UnitError(f"{odd!r} is no class of modules", fix="give classes, or their names")
    found = [module for module in model.modules() if any(_is_a(module, kind) for kind in kinds)]
    if not found and must:
        names = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in kinds)
        raise UnitError(
            f"no module of {type(model).__name__} is a {names}",
            fix="name a class that occurs in the model, or pass raise_if_not_found=False",
        )
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _is_a(module: nn.Module, kind: Kinds) -> bool:
    if isinstance(kind, type):
        return isinstance(module, kind)
    own = type(module)
    return kind in (own.__name__, f"{own.__module__}.{own.__qualname__}")


def _by_name(
    model: nn.Module, wanted: list[str], flag: bool, must: bool, fits: Callable[[str, str], bool]
) -> tuple[list[nn.Module], list[str]]:
    named = list(model.named_modules())
    missing = [one for one in wanted if not any(fits(name, one) for name, _ in named)]
    if missing and must:
        raise UnitError(
            f"no module of {type(model).__name__} is named {', '.join(map(repr, missing))}",
            fix="names are those of model.named_modules(); or pass raise_if_not_found=False",
        )
    found = [module for name, module in named if any(fits(name, one) for one in wanted)]
    for module in found:
        set_z3_leaf_module(module, flag)
    return found, missing


def _refuse_late(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        unit = next((u for p in module.parameters() if parked_in(p) is None and (u := unit_of(p)) is not None), None)
        if unit is not None and unit.module is not module:
            raise UnitError(
                f"{type(module).__name__} is in unit {unit.label} already: units are decided when a model is sharded",
                fix="set leaf modules before deepspeed.initialize",
            )
