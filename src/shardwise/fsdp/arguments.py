"""What torch's FSDP is told, as a strategy. Torch's objects are known by their attributes, and not imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.errors import ConfigError, StrategyError
from shardwise.strategy import Strategy

_PRESETS = {"FULL_SHARD": "zero3", "SHARD_GRAD_OP": "zero2", "NO_SHARD": "ddp", "HYBRID_SHARD": "hsdp"}
_KINDS = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")  # Accelerate numbers them
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def strategy_of(
    strategy: str | Strategy | None,
    *,
    reshard_after_forward: bool | int | None = None,
    mp_policy: Any = None,
    offload_policy: Any = None,
    mesh: Any = None,
    where: str,
) -> Strategy:
    """The strategy that the arguments of torch's ``fully_shard`` mean, beside one that is given.

    Raises:
        ConfigError, StrategyError: an argument that is not known, not served, or says something else than ``strategy``.
    """
    chosen = Strategy.parse(strategy)
    after = _after_forward(reshard_after_forward, mesh, where)
    if after is not None:
        if strategy is None:
            chosen = chosen.replace(preset="zero3" if after else "zero2")
        elif chosen.split_params != after:
            raise StrategyError(
                f"reshard_after_forward={reshard_after_forward} contradicts strategy '{chosen.preset}'",
                where=where,
                fix="leave one of them out: True is zero3, False is zero2",
            )
    param, reduce = precision_of("mp_policy", mp_policy, where=where)
    if param is not None and entry_of(mp_policy, "cast_forward_inputs") is False:
        raise StrategyError(
            "mp_policy: cast_forward_inputs=False is not served: units cast what they are called with",
            where=where,
            fix="leave it out, or say strategy='...,param_dtype=bf16,autocast=true', which leaves them as they are",
        )
    wanted: dict[str, Any] = {"param_dtype": param, "reduce_dtype": reduce}
    if offloads("offload_policy", offload_policy, where=where):
        wanted |= dict.fromkeys(("offload_params", "offload_grads", "offload_optimizer"), "cpu")
        wanted["pin_memory"] = bool(getattr(offload_policy, "pin_memory", True))
    default = Strategy(chosen.preset)
    for key, value in wanted.items():
        said = getattr(chosen, key)
        if value is not None and strategy is not None and said not in (getattr(default, key), value):
            raise StrategyError(f"{key} is {value}, and {said} by the strategy", where=where, fix="say it once")
    return chosen.replace(**{key: value for key, value in wanted.items() if value is not None})


def _after_forward(value: Any, mesh: Any, where: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    size = int(mesh.mesh.shape[-1]) if mesh is not None else _world_size()
    if isinstance(value, int) and value in (1, size):
        return value != 1 or size == 1
    raise StrategyError(
        f"reshard_after_forward={value!r} is not served: values are split over {size} ranks, or whole",
        where=where,
        fix="True (zero3), False (zero2), or strategy='hsdp,shard_size=...', which splits all states over fewer ranks",
    )


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def preset_of(field: str, value: Any, version: int | None, *, where: str) -> str:
    """The preset that ``sharding_strategy`` or ``reshard_after_forward`` means.

    Args:
        field: which of the two.
        value: a name, Accelerate's number of it, torch's own enumeration, or a truth value.
        version: of FSDP.
        where: who was told, for reports.
    """
    if isinstance(value, str) and version == 2 and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(value, bool):
        if field == "sharding_strategy":
            raise ConfigError(f"sharding_strategy={value} is not a name", where=where, fix=f"{', '.join(_KINDS)}")
        return "zero3" if value else "zero2"
    text = str(getattr(value, "name", value)).upper().lstrip("_")
    if text.isdigit() and 1 <= int(text) <= len(_KINDS):
        text = _KINDS[int(text) - 1]
    if text == "HYBRID_SHARD_ZERO2":
        raise StrategyError(
            "HYBRID_SHARD_ZERO2 (parameters whole after forward, split in groups) has no row in the strategy table",
            where=where,
            fix="use HYBRID_SHARD ('hsdp'), which needs less memory, or SHARD_GRAD_OP ('zero2')",
        )
    if text not in _PRESETS:
        raise ConfigError(f"{field}={value!r} is not known", where=where, fix=f"one of {', '.join(_KINDS[:4])}")
    return _PRESETS[text]


def precision_of(argument: str, policy: Any, *, where: str) -> tuple[str | None, str | None]:
    """(dtype to compute in, dtype to reduce in) of a name, a dtype, a dict or one of torch's policies."""
    if policy is None:
        return None, None
    if isinstance(policy, (str, torch.dtype)):
        name = policy if isinstance(policy, str) else _dtype(argument, policy, where)
        if name == "no":
            return None, None
        if name not in _DTYPES.values():
            raise ConfigError(f"{argument}={policy!r} is not served", where=where, fix="'bf16', 'fp16' or 'fp32'")
        return name, name
    if not any(has_entry(policy, key) for key in ("param_dtype", "reduce_dtype")):
        raise ConfigError(
            f"{argument} of type {type(policy).__name__} names no param_dtype and no reduce_dtype",
            where=where,
            fix="give a name, a dict, or torch's MixedPrecision or MixedPrecisionPolicy",
        )
    param, reduce = (_dtype(key, entry_of(policy, key), where) for key in ("param_dtype", "reduce_dtype"))
    return param, reduce


def has_entry(policy: Any, key: str) -> bool:
    """Does a policy, a dict or an object, speak of this?"""
    return key in policy if isinstance(policy, dict) else hasattr(policy, key)


def entry_of(policy: Any, key: str) -> Any:
    """What it says; ``None`` if nothing."""
    return policy.get(key) if isinstance(policy, dict) else getattr(policy, key, None)


def _dtype(key: str, value: Any, where: str) -> str | None:
    if value is None:
        return None
    name = _DTYPES.get(value) if isinstance(value, torch.dtype) else value
    if name not in _DTYPES.values():
        raise ConfigError(f"{key}={value!r} is not served", where=where, fix="bfloat16, float16 or float32")
    return str(name)


def offloads(argument: str, value: Any, *, where: str) -> bool:
    """Does it say that the states live on the CPU?"""
    if value is None or isinstance(value, bool):
        return bool(value)
    if hasattr(value, "offload_params"):  # torch's CPUOffload of FSDP 1
        return bool(value.offload_params)
    kinds = {kind.__name__ for kind in type(value).__mro__}
    if "OffloadPolicy" in kinds:  # torch's of FSDP 2
        return "CPUOffloadPolicy" in kinds
    raise ConfigError(f"{argument}={value!r} is not known", where=where, fix="True, False or torch's own objects")


def refuse_placement(place: Callable[[nn.Parameter], Any] | None, params: Iterable[nn.Parameter], where: str) -> None:
    """``shard_placement_fn`` chooses a dim to cut along; a flat buffer is cut anywhere."""
    if place is not None and any(place(p) is not None for p in params):
        raise StrategyError(
            "shard_placement_fn asks for a dim to cut along, but parameters lie end to end in a flat buffer",
            where=where,
            fix="leave it out; strategy='zero3,layout=tensor' never cuts a parameter",
        )


def parameters_of(argument: str, states: Iterable[Any] | None, where: str) -> list[nn.Parameter]:
    """The parameters among parameters and modules."""
    found: list[nn.Parameter] = []
    for item in states or ():
        if isinstance(item, nn.Parameter):
            found.append(item)
        elif isinstance(item, nn.Module):
            found += item.parameters()
        else:
            raise ConfigError(f"{argument} has a {type(item).__name__}", where=where, fix="give parameters or modules")
    return found
