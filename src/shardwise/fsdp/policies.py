"""Torch's wrapping policies as rules for units."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from shardwise.engine.select import UnitRule, has_forward, numel
from shardwise.errors import ConfigError

_WRAPS = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")


def rule_of(policy: Any, *, class_names: Collection[str] = (), least: int | None = None, where: str) -> UnitRule:
    """The rule for units that a policy means.

    Args:
        policy: a name of one, one of torch's own, a callable with its arguments, or ``None``.
        class_names, least: for the names of policies.
        where: who was told, for reports.

    Returns:
        Classes or a predicate; ``None``, which finds repeated blocks and what else is large, if it says nothing.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(policy, str):
        if policy.upper() not in _WRAPS:
            raise ConfigError(f"auto_wrap_policy='{policy}' is not known", where=where, fix=f"{', '.join(_WRAPS)}")
        policy = policy.upper()
    elif policy is not None and not callable(policy):
        raise ConfigError(f"auto_wrap_policy is a name or a callable, not {type(policy).__name__}", where=where)
    name = policy if isinstance(policy, str) else _name_of(policy)
    given = policy.keywords if isinstance(policy, functools.partial) else {}
    if name in ("TRANSFORMER_BASED_WRAP", "transformer_auto_wrap_policy"):
        if given.get("transformer_layer_cls"):
            return tuple(given["transformer_layer_cls"])
        return ClassNames(class_names) if class_names else None
    if name in ("SIZE_BASED_WRAP", "size_based_auto_wrap_policy"):
        least = given.get("min_num_params", least)
        return AtLeast(int(least)) if least else None
    if policy is None or name == "NO_WRAP":
        return None
    if hasattr(policy, "_module_classes"):  # torch's ModuleWrapPolicy
        return tuple(policy._module_classes)
    if name == "lambda_auto_wrap_policy":
        return Policy(given["lambda_fn"])
    return Policy(policy)


class ClassNames:
    """A rule for units: modules whose class has one of these names."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __call__(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ in self.names

    def __repr__(self) -> str:
        return f"classes named {', '.join(self.names)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassNames) and other.names == self.names

    def __hash__(self) -> int:
        return hash(self.names)


class AtLeast:
    """A rule for units: the smallest modules that have at least ``elements`` beside the units inside them."""

    def __init__(self, elements: int) -> None:
        self.elements = elements

    def __call__(self, name: str, module: nn.Module) -> bool:
        return self._is_unit(module)[0]

    def _is_unit(self, module: nn.Module) -> tuple[bool, int]:
        """Is it one, and how many elements does it leave to the module around it?"""
        left = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.MultiheadAttention):  # uses its parts' weights itself
            left = numel(module)
        else:
            left += sum(self._is_unit(child)[1] for child in module.children())
        unit = left >= self.elements and has_forward(module)
        return unit, 0 if unit else left

    def __repr__(self) -> str:
        return f"modules of at least {self.elements} elements"


class Policy:
    """A rule for units out of a callable: torch's wrapping policies, ``(name, module)`` or ``(module)``."""

    def __init__(self, policy: Callable[..., Any]) -> None:
        self.policy = policy
        parameters = inspect.signature(policy).parameters
        self.torch = "recurse" in parameters
        self.size = next((k for k in ("nonwrapped_numel", "unwrapped_params") if k in parameters), None)
        self.alone = len([p for p in parameters.values() if p.default is p.empty]) == 1

    def __call__(self, name: str, module: nn.Module) -> bool:
        if self.torch:
            size = {self.size: numel(module)} if self.size else {}
            return has_forward(module) and bool(self.policy(module, recurse=False, **size))
        return bool(self.policy(module) if self.alone else self.policy(name, module))

    def __repr__(self) -> str:
        return f"policy {_name_of(self.policy) or self.policy!r}"


def _name_of(policy: Any) -> str:
    return str(getattr(getattr(policy, "func", policy), "__name__", ""))
