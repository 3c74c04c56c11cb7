"""The small things in a folder of DeepSpeed: scheduler, loss scale, counters, and what the script put beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.checkpoint.deepspeed_folder import Folder
from shardwise.checkpoint.plain_values import Unknown, plain
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.torch_format import StandIn

COUNTERS = ("global_steps", "skipped_steps", "global_samples")
ENGINE = frozenset(
    {
        "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
        "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
        "dp_world_size", "mp_world_size", "ds_config", "ds_version", "num_experts", "ds_autoep_layers",
        "autoep_layers", "universal_checkpoint_info", "checkpoint_parallel_dimensions", "folding", *COUNTERS,
    }
)  # fmt: skip
"""What DeepSpeed itself keeps in a file of model states. The rest is the script's own ``client_state``."""
_SCALER = (
    "dynamic", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window", "min_scale",
    "delayed_shift", "cur_hysteresis", "consecutive_hysteresis", "raise_error_at_min_scale",
)  # fmt: skip


def small_state_of(folder: Folder) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """What is to be put back by hand.

    Returns:
        ``scheduler``, ``loss_scaler``, ``client_state`` and the counters; extra state of the model's modules by name;
        and what is of a class that is not known, in words.
    """
    first = folder.first
    left_out: list[str] = []
    with StorageReader() as reader:

        def read(value: Any, where: str) -> Any:
            try:
                return plain(value, reader)
            except Unknown as error:
                left_out.append(f"{where}: it is a {error}, or has one in it")
                return None

        own = {str(k): v for k, v in first.items() if str(k) not in ENGINE}
        client = {name: read(value, f"client_state['{name}']") for name, value in own.items()}
        extra = {
            str(name): read(value, f"extra state '{name}'")
            for name, value in first["module"].items()
            if str(name).rpartition(".")[2] == "_extra_state"
        }
        state = {"scheduler": read(first.get("lr_scheduler"), "the scheduler's state"), "client_state": client}
    unread = {item.split("'")[1] for item in left_out if item.startswith("client_state['")}
    state["client_state"] = {name: value for name, value in client.items() if name not in unread}
    state["loss_scaler"] = _loss_scaler(folder)
    for key in COUNTERS:
        value = first.get(key)
        state[key] = value if isinstance(value, int) else 0
    return state, extra, tuple(left_out)


def _loss_scaler(folder: Folder) -> dict[str, Any] | None:
    """By the names that DeepSpeed's own object has; ``None`` where nothing was scaled."""
    optim = (folder.optims or [folder.universal or folder.first.get("optimizer") or {}])[0]
    found = optim.get("loss_scaler")
    if isinstance(found, StandIn):
        states = [argument for argument in found.arguments if isinstance(argument, Mapping)]
        values = dict(states[-1]) if states else {}
    elif "cur_scale" in optim:
        values = {**optim, "dynamic": optim.get("dynamic_loss_scale", False)}
    else:
        return None
    out = {key: values[key] for key in _SCALER if isinstance(values.get(key), (bool, int, float))}
    return out if out.get("dynamic") or out.get("cur_scale", 1) != 1 else None
