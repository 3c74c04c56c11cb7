"""What ``shardwise launch`` says to the script it starts, read in one place by every door of the library.

A value given on the command line wins over the script's own, so that one script runs under every strategy:

``SHARDWISE_STRATEGY``
    from ``--strategy``; the string form of a :class:`~shardwise.Strategy`.
``SHARDWISE_MIXED_PRECISION``
    from ``--mixed-precision``; ``no``, ``fp16`` or ``bf16``.
``SHARDWISE_GRADIENT_ACCUMULATION_STEPS``
    from ``--gradient-accumulation-steps``; a number of micro-batches.
``SHARDWISE_CPU``
    from ``--cpu``; ``1``. The launcher also hides CUDA devices from what does not read this.
``SHARDWISE_DEEPSPEED_CONFIG``
    from ``--deepspeed-config``; the path of a DeepSpeed configuration, for an Accelerator in place of its strategy or
    plugin, and for ``shardwise.deepspeed.initialize`` where the script names none.
``SHARDWISE_RECORD``
    from ``--record``; a folder in which every rank writes down what it does: see :func:`shardwise.record`.
``SHARDWISE_STEPS``
    from ``compare``; a number of steps. Each rank ends there, as by ``sys.exit()``: at the first forward of the step
    that would follow. Only where the run is recorded.

A script started by ``accelerate launch`` finds that launcher's precision and accumulation steps as well, where it
says nothing itself. Its FSDP and DeepSpeed settings come in variables that are its own affair: they are refused
with the way out, not passed over.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError, StrategyError
from shardwise.strategy import Strategy

STRATEGY = "SHARDWISE_STRATEGY"
MIXED_PRECISION = "SHARDWISE_MIXED_PRECISION"
CPU = "SHARDWISE_CPU"
RECORD = "SHARDWISE_RECORD"
DEEPSPEED_CONFIG = "SHARDWISE_DEEPSPEED_CONFIG"
ACCUMULATION = "SHARDWISE_GRADIENT_ACCUMULATION_STEPS"
STEPS = "SHARDWISE_STEPS"
PRECISIONS = ("no", "fp16", "bf16")
_ACCELERATE_PRECISION = "ACCELERATE_MIXED_PRECISION"
_ACCELERATE_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_ACCELERATE_COMPILE = "ACCELERATE_DYNAMO_"
_COMPILE = ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC")
_ACCELERATE_MODES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_TPU": "TPU",
}


def local_rank(default: int = 0) -> int:
    """This rank's number on its host, as whatever launched it says in ``LOCAL_RANK``.

    Args:
        default: where nobody said anything.

    Raises:
        ConfigError: the variable holds no number.
    """
    text = os.environ.get("LOCAL_RANK", "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ConfigError(f"'{text}' is not the number of a rank", where="LOCAL_RANK", fix="a number from 0 on")
    return int(text)


def strategy_from_environment(default: str | Strategy | None = None) -> Strategy:
    """The strategy to use: the launcher's, else the script's ``default``, else ``zero3``, in the launcher's precision.

    Args:
        default: what the script asked for.

    Raises:
        StrategyError: the value (the variable's, or the default) is not a strategy.
    """
    text = os.environ.get(STRATEGY)
    mode = next((n for v, n in _ACCELERATE_MODES.items() if os.environ.get(v, "").lower() in ("true", "1")), None)
    if mode is not None and not text:
        raise StrategyError(
            f"'accelerate launch' was told to use {mode}, which Shardwise does not read from it",
            where="the environment of this process",
            fix="start the script with: shardwise launch --config your_accelerate_config.yaml, or --strategy zero3",
        )
    chosen = Strategy.parse(text if text else default)
    return chosen.in_precision(mixed_precision_from_environment()) if os.environ.get(MIXED_PRECISION) else chosen


def steps_from_environment() -> int | None:
    """After how many steps this process is to end; ``None``: when its script does.

    Raises:
        ConfigError: the value is no number of steps.
    """
    text = os.environ.get(STEPS)
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"'{text}' is not a number of steps", where=STEPS, fix="give 1 or more")
    return int(text)


def mixed_precision_from_environment(default: str | None = None) -> str | None:
    """The precision to compute in: the launcher's, else ``default``.

    Returns:
        ``"no"``, ``"fp16"``, ``"bf16"``, or ``None`` where neither said anything.

    Raises:
        StrategyError: the value is none of these.
    """
    given = os.environ.get(MIXED_PRECISION)
    value = given if given else default
    if value is None:
        value = os.environ.get(_ACCELERATE_PRECISION) or None
    if value is not None and value not in PRECISIONS:
        raise StrategyError(
            f"mixed precision '{value}' is not known",
            where=MIXED_PRECISION if given else "",
            fix=f"one of {', '.join(PRECISIONS)}",
        )
    return value


def accumulation_from_environment(default: int) -> int:
    """Micro-batches per optimizer step: Shardwise's launcher's, else the script's, else Accelerate's launcher's.

    Args:
        default: what the script says; 1 says nothing.

    Raises:
        StrategyError: the value is not a number of batches.
    """
    text = os.environ.get(ACCUMULATION) or (os.environ.get(_ACCELERATE_ACCUMULATION) if default == 1 else None)
    if not text:
        return default
    if not text.isdigit() or int(text) < 1:
        raise StrategyError(f"'{text}' is not a number of batches", where=ACCUMULATION, fix="give 1 or more")
    return int(text)


def compile_from_environment() -> dict[str, Any]:
    """Arguments for ``torch.compile`` that Accelerate's launcher was given; none if nothing is to be compiled."""
    said = {name: os.environ.get(f"{_ACCELERATE_COMPILE}{name}", "").lower() for name in _COMPILE}
    if said["BACKEND"] in ("", "no"):
        return {}
    found: dict[str, Any] = {"backend": said["BACKEND"]}
    if said["MODE"] not in ("", "default"):
        found["mode"] = said["MODE"]
    found |= {
        argument: True
        for argument in ("fullgraph", "dynamic")
        if said[f"USE_{argument.upper()}"] in ("true", "1", "yes", "y", "on")
    }
    return found


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """These variables, with upper-case names and values as strings, inside the block."""
    before = {key.upper(): os.environ.get(key.upper()) for key in kwargs}
    os.environ.update({key.upper(): str(value) for key, value in kwargs.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def stands_in_for(name: str) -> bool:
    """Does ``import accelerate``, say, mean Shardwise in this process? See :func:`shardwise.install_as`."""
    return str(Path(__file__).parent / "aliases" / name) in sys.path
