"""The stages of ZeRO by name, and the section ``zero_optimization`` as an object."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from shardwise.deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
    Section,
)
from shardwise.deepspeed_config import read_ds_config

__all__ = [
    "DeepSpeedZeroConfig",
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "ZeroStageEnum",
]


class ZeroStageEnum(IntEnum):
    """``zero_optimization.stage``."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class DeepSpeedZeroLeafModuleConfig(Section):
    """``leaf_module``: three lists of names."""

    _inside = "zero_optimization.leaf_module"


class DeepSpeedZeroConfig(Section):
    """``zero_optimization``: its keys are attributes, under their newest names. ``model_dump()`` is the section again.

    Args:
        data: the section's keys.

    Raises:
        ConfigError: a key that is unknown or not served, or values that contradict each other.
    """

    _inside = "zero_optimization"

    def __init__(self, **data: Any) -> None:
        facts = read_ds_config({"zero_optimization": data}, type(self).__name__)
        super().__init__(**data)
        self.stage = ZeroStageEnum(facts.stage or 0)
        self.leaf_module = DeepSpeedZeroLeafModuleConfig(
            **{"classes": [], "names": [], "name_suffixes": []} | facts.leaf_modules
        )
        for name, kind, home in (
            ("offload_param", DeepSpeedZeroOffloadParamConfig, facts.offload_params),
            ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig, facts.offload_optimizer),
        ):
            part = data.get(name)
            if part is None and home != "device":  # said in the old way
                part = {"device": home}
            setattr(self, name, kind(**part) if isinstance(part, dict) else part)
