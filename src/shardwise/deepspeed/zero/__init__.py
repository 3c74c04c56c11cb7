"""What scripts call around an engine whose parameters are split: DeepSpeed's ``deepspeed.zero``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from shardwise.deepspeed.refused import NAMES, error
from shardwise.lazy import importing

if TYPE_CHECKING:
    from shardwise.deepspeed.zero.external import register_external_parameter, unregister_external_parameter
    from shardwise.deepspeed.zero.gathering import GatheredParameters, unwrap_model_for_generation
    from shardwise.deepspeed.zero.init import Init, MiCS_Init, restore_init_context, shutdown_init_context
    from shardwise.deepspeed.zero.status import DeepSpeedTensorOverride, ZeroParamStatus, ZeroParamType

_HOME = {
    "DeepSpeedTensorOverride": "status",
    "GatheredParameters": "gathering",
    "Init": "init",
    "MiCS_Init": "init",
    "ZeroParamStatus": "status",
    "ZeroParamType": "status",
    "register_external_parameter": "external",
    "restore_init_context": "init",
    "shutdown_init_context": "init",
    "unregister_external_parameter": "external",
    "unwrap_model_for_generation": "gathering",
}
__all__ = [
    "DeepSpeedTensorOverride",
    "GatheredParameters",
    "Init",
    "MiCS_Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "register_external_parameter",
    "restore_init_context",
    "shutdown_init_context",
    "unregister_external_parameter",
    "unwrap_model_for_generation",
]

_named = importing(__name__, _HOME)


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise error(name, importing=sys._getframe(1).f_code.co_name == "_handle_fromlist")
    return _named(name)
