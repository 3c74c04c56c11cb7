"""Read what a launcher needs from the JSON file that an Accelerate config names as its DeepSpeed config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwise.errors import LaunchError

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu")
_BUILT_IN_SCRIPT = ("optimizer", "scheduler")
_REFUSED = {
    "zero_quantized_weights": "quantized collectives",
    "zero_quantized_gradients": "quantized collectives",
}


def flatten(path: Path, named_in: Path, notes: list[str], dropped: dict[str, str]) -> dict[str, Any]:
    """The file's settings under the names that Accelerate's ``deepspeed_config`` has for them.

    Args:
        path: the JSON file.
        named_in: the file that names it.
        notes, dropped: added to, as in :func:`shardwise.cli.accelerate_file.translate`.

    Raises:
        LaunchError: the file cannot be read, or asks for something that is not served.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(
            f"cannot read {path}: {error.strerror or error}", fix=f"correct deepspeed_config_file in {named_in}"
        ) from None
    except ValueError as error:
        raise LaunchError(f"not valid JSON: {error}", where=str(path), fix="correct the file") from None
    if not isinstance(values, dict):
        raise LaunchError("not a DeepSpeed config: it does not hold keys and values", where=str(path))
    out: dict[str, Any] = {}
    zero = _part(values, "zero_optimization")
    out["zero_stage"] = zero.pop("stage", 0)
    for key, name in (("offload_optimizer", "offload_optimizer_device"), ("offload_param", "offload_param_device")):
        part = _part(zero, key)
        out[name] = part.get("device", "none")
        if part.get("nvme_path") is not None:
            out[f"{key}_nvme_path"] = part["nvme_path"]
        if key == "offload_optimizer" and part.get("ratio") is not None:
            out["offload_ratio"] = part["ratio"]
    for key, what in _REFUSED.items():
        if zero.pop(key, False):
            raise LaunchError(
                f"zero_optimization.{key}: {what} are not served", where=str(path), fix=f"leave out {key}"
            )
    if zero.pop("zero_hpz_partition_size", 1) > 1:
        raise LaunchError(
            "zero_optimization.zero_hpz_partition_size is not served from this file",
            where=str(path),
            fix="--strategy hsdp,shard_size=...",
        )
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if key in values:
            out[key] = values.pop(key)
    saved = _part(values, "activation_checkpointing")
    out["cpu_checkpointing"] = saved.pop("cpu_checkpointing", False)
    for key in saved:
        dropped[f"{path.name}: activation_checkpointing.{key}"] = "a setting of DeepSpeed's engine"
    for name in ("bf16", "fp16"):
        if _part(values, name).get("enabled") is True:
            out["mixed_precision"] = name
    for key in _BATCH:
        if values.pop(key, "auto") != "auto":
            dropped[f"{path.name}: {key}"] = "the script's DataLoader says the batch size of a rank"
    for key in _BUILT_IN_SCRIPT:
        if values.pop(key, None):
            notes.append(f"'{key}' of {path.name}: build it in the script, in place of accelerate's Dummy class")
    for key in (*zero, *values):
        dropped[f"{path.name}: {key}"] = "a setting of DeepSpeed's engine"
    return out


def _part(values: dict[str, Any], key: str) -> dict[str, Any]:
    part = values.pop(key, None)
    return dict(part) if isinstance(part, dict) else {}
