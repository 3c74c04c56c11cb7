"""What scripts import from ``deepspeed.utils``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardwise.lazy import importing

if TYPE_CHECKING:
    from shardwise.deepspeed.runtime.dataloader import RepeatingLoader
    from shardwise.deepspeed.utils.init_on_device import OnDevice
    from shardwise.deepspeed.utils.logging import log_dist, log_dist_once, logger, set_log_level_from_string
    from shardwise.deepspeed.utils.nvtx import instrument_w_nvtx
    from shardwise.deepspeed.utils.tensor_fragment import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
        safe_update_full_grad_vectorized,
    )
    from shardwise.deepspeed.zero.leaf import (
        get_z3_leaf_modules,
        set_z3_leaf_module,
        set_z3_leaf_modules,
        set_z3_leaf_modules_by_name,
        set_z3_leaf_modules_by_suffix,
        unset_z3_leaf_modules,
        z3_leaf_parameter,
    )

# Now: the function is to have the name that importing the module would take later.
from shardwise.deepspeed.utils.z3_leaf_module import z3_leaf_module

__all__ = [
    "OnDevice",
    "RepeatingLoader",
    "get_z3_leaf_modules",
    "instrument_w_nvtx",
    "log_dist",
    "log_dist_once",
    "logger",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "set_log_level_from_string",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]
_HOME = {name: "tensor_fragment" for name in __all__ if name.startswith("safe_")}
_HOME |= {name: "z3_leaf_module" for name in __all__ if "z3_leaf" in name}
_HOME |= {
    "OnDevice": "init_on_device",
    "RepeatingLoader": "dataloader",
    "instrument_w_nvtx": "nvtx",
    "log_dist": "logging",
    "log_dist_once": "logging",
    "logger": "logging",
    "set_log_level_from_string": "logging",
}
_MODULES = ("groups", "logging", "nvtx", "zero_to_fp32")

__getattr__ = importing(__name__, _HOME, _MODULES)
