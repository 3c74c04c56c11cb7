"""Where Accelerate's words for DeepSpeed's settings stand in a configuration."""

from __future__ import annotations

from typing import Any

from shardwise.errors import ConfigError

PLACES = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}


def section_of(config: dict[str, Any], place: str, where: str) -> tuple[dict[str, Any], str]:
    """The section that a place is in, which is made if it is not there, and the key in it.

    Raises:
        ConfigError: something else is there.
    """
    *path, key = place.split(".")
    part = config
    for step in path:
        if part.get(step) is None:
            part[step] = {}
        part = part[step]
        if not isinstance(part, dict):
            raise ConfigError(f"{step} is a section, not {part!r}", where=where, fix="write it as an object")
    return part, key
