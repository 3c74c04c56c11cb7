"""DeepSpeed's logger, under its name: scripts set its level, or read what it says."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence

from shardwise.errors import ConfigError
from shardwise.operations import rank_and_size

log_levels = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def _made() -> logging.Logger:
    found = logging.getLogger("DeepSpeed")
    if not found.handlers:
        handler = logging.StreamHandler(stream=sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d] %(message)s"))
        found.addHandler(handler)
        found.propagate = False
        found.setLevel(logging.WARNING)
    return found


logger = _made()


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Write a message with its rank in front.

    Args:
        ranks: who writes; ``None``, or with ``-1`` in it: every rank.
    """
    rank = rank_and_size()[0]
    if ranks is None or -1 in ranks or rank in ranks:
        logger.log(level, f"[Rank {rank}] {message}", stacklevel=2)


@functools.cache
def _once(message: str, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks, level)


def log_dist_once(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """:func:`log_dist`, the first time it gets these arguments."""
    _once(message, None if ranks is None else tuple(ranks), level)


@functools.cache
def warning_once(message: str) -> None:
    """A warning, the first time it is given."""
    logger.warning(message, stacklevel=2)


def print_dist(message: str, ranks: Sequence[int] | None = None) -> None:
    """Print a message with its rank in front, on some ranks."""
    rank = rank_and_size()[0]
    if ranks is None or -1 in ranks or rank in ranks:
        print(f"[Rank {rank}] {message}", flush=True)


def get_log_level_from_string(log_level_str: str) -> int:
    """The number of a level.

    Raises:
        ConfigError: there is no such level.
    """
    found = log_levels.get(log_level_str.lower()) if isinstance(log_level_str, str) else None
    if found is None:
        raise ConfigError(f"{log_level_str!r} is not a log level", fix=f"one of {', '.join(log_levels)}")
    return found


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the logger's level by its name."""
    (custom_logger or logger).setLevel(get_log_level_from_string(log_level_str))


def should_log_le(max_log_level_str: str) -> bool:
    """Is the logger's level at most this one?"""
    return logger.getEffectiveLevel() <= get_log_level_from_string(max_log_level_str)
