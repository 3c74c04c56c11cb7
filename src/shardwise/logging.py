"""A logger that knows its rank: one line per run instead of one per rank, or all ranks' lines, one after the other.

::

    logger = get_logger(__name__, log_level="INFO")
    logger.info("starts")                                # rank 0 only
    logger.info("has %d batches", n, main_process_only=False)  # every rank
    logger.info("is here", in_order=True)                # every rank, in order of ranks; a collective

Names mean what they mean in Accelerate. There a logger raises before an Accelerator exists; this one works then too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch.distributed as dist

from shardwise import operations
from shardwise.errors import CommError, ConfigError
from shardwise.operations import rank_and_size

LEVEL = "SHARDWISE_LOG_LEVEL"


class MultiProcessAdapter(logging.LoggerAdapter):
    """A :class:`logging.LoggerAdapter` that writes on rank 0 only, unless told otherwise. See :func:`get_logger`.

    Every line begins with ``[RANK n]``.
    """

    def __init__(self, logger: logging.Logger, extra: Mapping[str, object] | None = None) -> None:
        super().__init__(logger, {} if extra is None else extra)
        self._said: set[tuple[str, str]] = set()

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """The message with its rank in front; the caller's ``extra`` wins over the adapter's."""
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        kwargs.setdefault("stacklevel", 2)  # so that file and line are the caller's, not this file's
        return f"[RANK {rank_and_size()[0]}] {msg}", kwargs

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Write a message, where it is wanted.

        Args:
            level, msg, args: as for :meth:`logging.Logger.log`.
            kwargs: the same, and ``main_process_only`` (``True``: rank 0 only) and ``in_order`` (``False``; every
                rank writes, rank 0 first, whatever ``main_process_only`` is).

        Raises:
            CommError: ``in_order`` before the ranks joined a process group.

        Cost: ``in_order`` is a collective: every rank must make the call, at whatever level its logger is, and all
            wait for each other once per rank.
        """
        main_process_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        rank, size = rank_and_size()
        if in_order and size > 1 and not dist.is_initialized():
            raise CommError(
                "in_order=True needs the process group, and the ranks have not joined it yet",
                where=f"rank {rank}",
                fix="create the Accelerator (or PartialState) first, or log with main_process_only=False",
            )
        # Levels may differ between ranks (scripts silence all but one), waiting must not.
        turns = range(size) if in_order else range(1)
        here = rank if in_order else (0 if rank == 0 or not main_process_only else -1)
        enabled = self.isEnabledFor(level)
        if enabled:
            msg, kwargs = self.process(msg, kwargs)  # type: ignore[assignment]
        for turn in turns:
            if enabled and turn == here:
                self.logger.log(level, msg, *args, **kwargs)
            if in_order and size > 1:
                operations.barrier()

    def warning_once(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """A warning, the first time this logger gets it with these arguments.

        Give ``in_order`` only what every rank says equally often: it is a collective, each time.
        """
        key = (str(msg), repr(args))
        if key not in self._said:
            self._said.add(key)
            kwargs.setdefault("stacklevel", 3)  # past this function as well
            self.log(logging.WARNING, msg, *args, **kwargs)


def get_logger(name: str, log_level: str | int | None = None) -> MultiProcessAdapter:
    """A logger for several ranks.

    Args:
        name: as for :func:`logging.getLogger`; ``__name__`` as a rule.
        log_level: a level's name in any case, or its number; by default the environment variable
            ``SHARDWISE_LOG_LEVEL``, and without that the level stays what it is. Only this logger is changed, not
            the root logger.

    Returns:
        The adapter. Its methods take ``main_process_only`` and ``in_order``; see :meth:`MultiProcessAdapter.log`.

    Raises:
        ConfigError: no such level.
    """
    logger = logging.getLogger(name)
    where = f"get_logger({name!r})" if log_level is not None else LEVEL
    level = log_level if log_level is not None else os.environ.get(LEVEL)
    if level is not None and level != "":
        try:
            logger.setLevel(level.upper() if isinstance(level, str) else level)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{level!r} is not a log level", where=where, fix="one of DEBUG, INFO, WARNING, ERROR, CRITICAL"
            ) from error
    return MultiProcessAdapter(logger)
