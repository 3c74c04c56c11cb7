"""``deepspeed.runtime.engine``: where scripts take the engine's class from."""

from __future__ import annotations

from shardwise.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
