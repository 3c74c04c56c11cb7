"""``deepspeed.moe.layer``, for scripts that ask ``isinstance(module, MoE)``."""

from __future__ import annotations

from typing import Any

from shardwise.deepspeed.refused import error


class MoE:
    """No module is one, and none can be made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise error("MoE")
