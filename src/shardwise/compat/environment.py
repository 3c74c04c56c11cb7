"""Environment variables: reading them, and changing them for a while."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shardwise.environment import local_rank, patch_environment
from shardwise.errors import ConfigError

__all__ = [
    "are_libraries_initialized",
    "clear_environment",
    "current_local_rank",
    "get_int_from_env",
    "parse_choice_from_env",
    "parse_flag_from_env",
    "patch_environment",
    "str_to_bool",
]

_TRUE = ("y", "yes", "t", "true", "on", "1")
_FALSE = ("n", "no", "f", "false", "off", "0")


def current_local_rank() -> int:
    """This rank's number on its host, as the launcher says."""
    return local_rank()


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """1 for yes, true, on, 1 (also their first letters), 0 for no, false, off, 0.

    Args:
        to_bool: return ``True`` and ``False`` instead.

    Raises:
        ConfigError: anything else.
    """
    text = value.lower()
    if text not in _TRUE + _FALSE:
        raise ConfigError(f"{value!r} is neither true nor false", fix=f"one of {', '.join(_TRUE + _FALSE)}")
    return text in _TRUE if to_bool else int(text in _TRUE)


def get_int_from_env(env_keys: Sequence[str], default: int) -> int:
    """The first of these variables that holds a number of at least 0, else ``default``.

    Raises:
        ConfigError: a variable that is set holds no whole number.
    """
    for key in env_keys:
        text = os.environ.get(key)
        if text is None:
            continue
        try:
            value = int(text)
        except ValueError:
            raise ConfigError(f"{key}={text!r} is not a whole number", fix=f"correct or unset {key}") from None
        if value >= 0:
            return value
    return default


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Is the variable set to yes? ``default`` where it is not set.

    Raises:
        ConfigError: it is set to neither yes nor no.
    """
    return bool(str_to_bool(os.environ.get(key, str(default))))


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """The value of the variable, or ``default`` as a string."""
    return os.environ.get(key, str(default))


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Those of these libraries that are imported already."""
    return [name for name in library_names if name in sys.modules]


@contextmanager
def clear_environment() -> Iterator[None]:
    """No environment variables inside the block; what was there before is there again after it."""
    before = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
