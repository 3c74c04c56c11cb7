"""A progress bar that one rank per host draws."""

from __future__ import annotations

from typing import Any

from shardwise.compat.environment import current_local_rank
from shardwise.errors import ConfigError, MissingPackage


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """``tqdm.auto.tqdm`` with these arguments.

    Args:
        main_process_only: only the first rank of each host draws.

    Raises:
        MissingPackage: ``tqdm`` is not installed.
        ConfigError: the first argument is ``True`` or ``False``, which older versions of Accelerate took here.
    """
    try:
        from tqdm.auto import tqdm as bar
    except ImportError:
        raise MissingPackage("the package 'tqdm' is not installed", fix="pip install tqdm") from None
    if args and isinstance(args[0], bool):
        raise ConfigError(f"tqdm was given {args[0]} as what to iterate over", fix="say main_process_only= by its name")
    disable = kwargs.pop("disable", False) or (main_process_only and current_local_rank() != 0)
    return bar(*args, disable=disable, **kwargs)
