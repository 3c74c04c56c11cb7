"""What ``shardwise launch`` says to the script it starts, read in one place by every door of the library.

A value given on the command line wins over the script's own, so that one script runs under every strategy:

``SHARDWISE_STRATEGY``
    from ``--strategy``; the string form of a :class:`~shardwise.Strategy`.
``SHARDWISE_MIXED_PRECISION``
    from ``--mixed-precision``; ``no``, ``fp16`` or ``bf16``.
``SHARDWISE_CPU``
    from ``--cpu``; ``1``. The launcher also hides the CUDA devices, so nothing has to read this to obey it.
"""

from __future__ import annotations

import os

from shardwise.errors import StrategyError
from shardwise.strategy import Strategy

STRATEGY = "SHARDWISE_STRATEGY"
MIXED_PRECISION = "SHARDWISE_MIXED_PRECISION"
CPU = "SHARDWISE_CPU"
PRECISIONS = ("no", "fp16", "bf16")


def strategy_from_environment(default: str | Strategy | None = None) -> Strategy:
    """The strategy to use: the launcher's, else the script's ``default``, else ``zero3``, in the launcher's precision.

    Args:
        default: what the script asked for.

    Raises:
        StrategyError: the value (the variable's, or the default) is not a strategy.
    """
    text = os.environ.get(STRATEGY)
    chosen = Strategy.parse(text if text else default)
    precision = os.environ.get(MIXED_PRECISION)
    if precision:
        wanted = mixed_precision_from_environment()
        chosen = chosen.replace(param_dtype=None if wanted == "no" else wanted)
    return chosen


def mixed_precision_from_environment(default: str | None = None) -> str | None:
    """The precision to compute in: the launcher's, else ``default``.

    Returns:
        ``"no"``, ``"fp16"``, ``"bf16"``, or ``None`` where neither said anything.

    Raises:
        StrategyError: the value is none of these.
    """
    given = os.environ.get(MIXED_PRECISION)
    value = given if given else default
    if value is not None and value not in PRECISIONS:
        raise StrategyError(
            f"mixed precision '{value}' is not known",
            where=MIXED_PRECISION if given else "",
            fix=f"one of {', '.join(PRECISIONS)}",
        )
    return value
