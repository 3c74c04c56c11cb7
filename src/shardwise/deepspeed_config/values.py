"""Values of a configuration: what says something, what is on, numbers and sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.errors import ConfigError

AUTO = "auto"


def said(value: Any) -> bool:
    """Does a value say something? ``None``, ``"auto"``, ``False`` and an empty section do not."""
    return value not in (None, AUTO, False) and value != {}


_ON_BY_NAME = ("zenflow",)  # sections that DeepSpeed turns on when they are there, whatever they say


def is_on(key: str, value: Any) -> bool:
    """Does the value of a key that is not served ask for it?

    Args:
        key: its name: sizes and ratios ask for nothing when they are 1.
        value: a section is on if ``enabled`` says so, or else if anything in it is.
    """
    if isinstance(value, Mapping):
        if not value:
            return key in _ON_BY_NAME
        if "enabled" in value:
            return said(value["enabled"])
        return any(is_on(name, inner) for name, inner in value.items())
    if key.endswith(("_size", "ratio")):
        return said(value) and value not in (0, 1)
    return said(value) and value not in (0, [], ())


def section(config: Mapping[str, Any], name: str, where: str, prefix: str = "") -> Mapping[str, Any]:
    """The section ``name``; empty if there is none.

    Raises:
        ConfigError: it is something else.
    """
    part = config.get(name)
    if part in (None, AUTO):
        return {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"{prefix}{name} is a section, not {part!r}", where=where, fix="write it as an object")
    return part


def number(value: Any, name: str, kind: type, where: str, least: float | None = None) -> Any:
    """A number of ``kind``, or ``None`` if it is not said.

    Raises:
        ConfigError: it is something else, or less than ``least``.
    """
    if value in (None, AUTO):
        return None
    value = getattr(value, "value", value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is(kind, value):
        raise ConfigError(f"{name}={value!r} is not {'a whole' if kind is int else 'a'} number", where=where)
    if least is not None and value < least:
        raise ConfigError(f"{name}={value!r} is less than {least:g}", where=where, fix=f"give {least:g} or more")
    return kind(value)


def _is(kind: type, value: float) -> bool:
    try:
        return bool(kind(value) == value)
    except (OverflowError, ValueError):  # infinity as a whole number
        return False


def flag(value: Any, name: str, where: str, default: bool) -> bool:
    """True or false; ``default`` if it is not said.

    Raises:
        ConfigError: it is something else.
    """
    if value in (None, AUTO):
        return default
    if value not in (True, False):  # 0 and 1 do, as in DeepSpeed
        raise ConfigError(f"{name}={value!r} is neither true nor false", where=where)
    return bool(value)
