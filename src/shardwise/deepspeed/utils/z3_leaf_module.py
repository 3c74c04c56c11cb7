"""Leaf modules, where DeepSpeed has them: the names of :mod:`shardwise.deepspeed.zero.leaf`."""

from __future__ import annotations

from typing import Any

from shardwise.deepspeed.zero import leaf


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(leaf, name)
