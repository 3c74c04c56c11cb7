"""What torch's ``fully_shard`` is told, as a strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.errors import StrategyError
from shardwise.strategy import Strategy

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def strategy_of(
    strategy: str | Strategy | None,
    *,
    reshard_after_forward: bool | int | None = None,
    mp_policy: Any = None,
    offload_policy: Any = None,
    mesh: Any = None,
) -> Strategy:
    """The strategy that torch's arguments mean, beside one that is given.

    Raises:
        StrategyError: an argument that is not known, not served, or says something else than ``strategy``.
    """
    chosen = Strategy.parse(strategy)
    after = _after_forward(reshard_after_forward, mesh)
    if after is not None:
        if strategy is None:
            chosen = chosen.replace(preset="zero3" if after else "zero2")
        elif chosen.split_params != after:
            raise StrategyError(
                f"reshard_after_forward={reshard_after_forward} contradicts strategy '{chosen.preset}'",
                fix="leave one of them out: True is zero3, False is zero2",
            )
    return _set(_set(chosen, precision_of(mp_policy, "mp_policy")), _offload_of(offload_policy))


def _set(chosen: Strategy, wanted: dict[str, Any]) -> Strategy:
    default = Strategy(chosen.preset)
    for key, value in wanted.items():
        if getattr(chosen, key) not in (getattr(default, key), value):
            raise StrategyError(
                f"{key} is {value} by one argument and {getattr(chosen, key)} by the strategy", fix="say it once"
            )
    return chosen.replace(**wanted)


def _after_forward(value: Any, mesh: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    size = int(mesh.mesh.shape[-1]) if mesh is not None else _world_size()
    if isinstance(value, int) and value in (1, size):
        return value != 1 or size == 1
    raise StrategyError(
        f"reshard_after_forward={value!r} is not served: values are split over {size} ranks, or whole",
        fix="True (zero3), False (zero2), or strategy='hsdp,shard_size=...', which splits all states over fewer ranks",
    )


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def precision_of(policy: Any, argument: str) -> dict[str, Any]:
    """``param_dtype`` and ``reduce_dtype`` of a ``MixedPrecisionPolicy``, or of an object with these attributes."""
    if policy is None:
        return {}
    if not hasattr(policy, "param_dtype") or not hasattr(policy, "reduce_dtype"):
        raise StrategyError(
            f"{argument} is a MixedPrecisionPolicy, not {type(policy).__name__}",
            fix="MixedPrecisionPolicy(param_dtype=torch.bfloat16), or strategy='zero3,param_dtype=bf16'",
        )
    wanted = {}
    for key in ("param_dtype", "reduce_dtype"):
        dtype = getattr(policy, key)
        if dtype is None:
            continue
        if dtype not in _NAMES:
            raise StrategyError(f"{key}={dtype} is not served", where=argument, fix="float32, bfloat16 or float16")
        wanted[key] = _NAMES[dtype]
    if "param_dtype" in wanted and getattr(policy, "cast_forward_inputs", True) is False:
        raise StrategyError(
            "cast_forward_inputs=False is not served: units cast what they are called with",
            where=argument,
            fix="leave it out, or leave param_dtype out and use torch.autocast",
        )
    return wanted


def _offload_of(policy: Any) -> dict[str, Any]:
    kinds = {kind.__name__ for kind in type(policy).__mro__}
    if policy is None or (kinds & {"OffloadPolicy"} and "CPUOffloadPolicy" not in kinds):
        return {}
    if "CPUOffloadPolicy" not in kinds:
        raise StrategyError(
            f"offload_policy is an OffloadPolicy, not {type(policy).__name__}",
            fix="CPUOffloadPolicy(), or strategy='zero3,offload_params=cpu,offload_optimizer=cpu'",
        )
    states = ("offload_params", "offload_grads", "offload_optimizer")
    return {**dict.fromkeys(states, "cpu"), "pin_memory": bool(getattr(policy, "pin_memory", True))}


def refuse_placement(place: Callable[[nn.Parameter], Any] | None, params: Iterable[nn.Parameter]) -> None:
    """``shard_placement_fn`` chooses a dim to cut along; a flat buffer is cut anywhere."""
    if place is not None and any(place(p) is not None for p in params):
        raise StrategyError(
            "shard_placement_fn asks for a dim to cut along, but parameters lie end to end in a flat buffer",
            fix="leave it out; strategy='zero3,layout=tensor' never cuts a parameter",
        )


def parameters_of(states: Iterable[Any] | None, argument: str) -> list[nn.Parameter]:
    """The parameters among parameters and modules that are to be left alone."""
    found: list[nn.Parameter] = []
    for item in states or ():
        if isinstance(item, nn.Parameter):
            found.append(item)
        elif isinstance(item, nn.Module):
            found += item.parameters()
        else:
            raise StrategyError(f"{argument} has a {type(item).__name__}", fix="give parameters or modules")
    return found
