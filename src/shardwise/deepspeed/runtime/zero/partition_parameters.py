"""Names of ``deepspeed.zero``, where other libraries import them from."""

from shardwise.deepspeed.zero.external import register_external_parameter, unregister_external_parameter
from shardwise.deepspeed.zero.gathering import GatheredParameters
from shardwise.deepspeed.zero.init import Init, restore_init_context, shutdown_init_context
from shardwise.deepspeed.zero.status import DeepSpeedTensorOverride, ZeroParamStatus, ZeroParamType

__all__ = [
    "DeepSpeedTensorOverride",
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "register_external_parameter",
    "restore_init_context",
    "shutdown_init_context",
    "unregister_external_parameter",
]
