"""Every key of a configuration is known, and none asks for what is not done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.deepspeed_config.keys import Key, Kind
from shardwise.deepspeed_config.tables import TABLES
from shardwise.deepspeed_config.values import AUTO, is_on, said, section
from shardwise.errors import ConfigError, did_you_mean

DOORS = ("deepspeed", "accelerate")
"""Who reads: ``shardwise.deepspeed``, or an Accelerator's plugin and launcher, whose scripts do more by themselves."""


@dataclass
class Checked:
    """Keys without effect, and keys left to be filled in by somebody."""

    idle: list[str]
    unfilled: list[str]


def check_keys(config: Mapping[str, Any], door: str, where: str) -> Checked:
    """Look at all keys.

    Args:
        config: the whole configuration.
        door: one of :data:`DOORS`.
        where: where it came from, for errors.

    Raises:
        ConfigError: a key that is unknown, or that asks for what is not done here.
    """
    found = Checked([], [])
    _check(config, "", door, where, found, quiet=False)
    return found


def _check(part: Mapping[str, Any], inside: str, door: str, where: str, found: Checked, quiet: bool) -> None:
    table = TABLES[inside]
    prefix = f"{inside}." if inside else ""
    # What is in a section that is off says nothing, but must exist all the same.
    switch = table.get("enabled")
    if switch is not None and switch.needed and part.get("enabled") != AUTO and not said(part.get("enabled")):
        quiet = True
    for name, value in part.items():
        path = f"{prefix}{name}"
        key = _seen_from(door, table.get(name))
        if key is None:
            raise _unknown(str(name), inside, where)
        if key.kind is Kind.REFUSED and not quiet and is_on(name, value):
            raise ConfigError(f"{path} is not served: {key.says}", where=where, fix=key.fix)
        if not quiet and value == AUTO:
            found.unfilled.append(path)
        if path in TABLES and key.kind is not Kind.REFUSED:
            oldest = path == "zero_optimization" and value is True  # which was stage 1
            inner = {} if value is False or oldest else section(part, name, where, prefix)
            _check(inner, path, door, where, found, quiet or key.kind is Kind.TUNES)
        off = isinstance(value, Mapping) and value.get("enabled") is False
        if key.kind is Kind.TUNES and not quiet and said(value) and not off:
            found.idle.append(path)


def _seen_from(door: str, key: Key | None) -> Key | None:
    return key.accelerate if key is not None and door == "accelerate" and key.accelerate is not None else key


def _unknown(name: str, inside: str, where: str) -> ConfigError:
    path = f"{inside}.{name}" if inside else name
    elsewhere = [section for section, table in TABLES.items() if name in table and section != "bfloat16"]
    if len(elsewhere) == 1:
        fix = f"it belongs {'into ' + elsewhere[0] if elsewhere[0] else 'to the top of the configuration'}"
    else:
        fix = did_you_mean(name, TABLES[inside], otherwise="leave it out")
    return ConfigError(f"{path} is not a key of DeepSpeed that is known here", where=where, fix=fix)
