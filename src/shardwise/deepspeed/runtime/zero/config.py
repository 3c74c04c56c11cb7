"""The stages of ZeRO by name."""

from __future__ import annotations

from enum import IntEnum


class ZeroStageEnum(IntEnum):
    """``zero_optimization.stage``."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3
