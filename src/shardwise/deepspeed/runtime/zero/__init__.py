"""``deepspeed.runtime.zero``: the names of ``deepspeed.zero``, and modules that other libraries import from."""

from __future__ import annotations

from typing import Any

from shardwise.lazy import importing

_MODULES = ("config", "offload_config", "partition_parameters", "stage3", "stage_1_and_2")
_own = importing(__name__, {}, _MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return _own(name)
    from shardwise.deepspeed import zero

    return getattr(zero, name)
