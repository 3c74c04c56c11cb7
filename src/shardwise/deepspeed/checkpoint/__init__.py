"""``deepspeed.checkpoint``: conversions between numbers of ranks. Nothing needs one here.

``engine.load_checkpoint`` and ``shardwise.checkpoint.load`` take any folder into any strategy and number of ranks, also
"universal" ones. ``shardwise checkpoint export --format deepspeed --stage --ranks`` writes one for DeepSpeed itself.
"""

from __future__ import annotations

from typing import NoReturn

from shardwise.errors import LeftOut

_NAMES = ("DeepSpeedCheckpoint", "ds_to_universal", "enable_universal_checkpoint", "UNIVERSAL_CHECKPOINT_INFO")


class _Absent(LeftOut, AttributeError):
    """So that ``hasattr`` says no."""


def __getattr__(name: str) -> NoReturn:
    if name in _NAMES:
        raise _Absent(
            f"'{name}' of DeepSpeed is left out: checkpoints need no conversion",
            where="shardwise.deepspeed.checkpoint",
            fix="load the folder as it is; or write another one: shardwise checkpoint export --format deepspeed",
        )
    raise AttributeError(f"module 'shardwise.deepspeed.checkpoint' has no attribute {name!r}")
