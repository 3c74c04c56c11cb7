"""Dtypes, and how losses are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from shardwise.deepspeed_config.facts import LossScaling
from shardwise.deepspeed_config.values import flag, number, said, section
from shardwise.errors import ConfigError

_DTYPES = {"fp32": "fp32", "float32": "fp32", "fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
# A power beyond that is no finite number in the fp32 in which losses are scaled.
_LARGEST_POWER = 127


def precision(config: Mapping[str, Any], where: str) -> tuple[str | None, LossScaling | None, dict[str, Any], bool]:
    """(the dtype to compute in, the scaling of losses, what was said of it for torch's scaler, skip steps with
    gradients that are not finite).

    Raises:
        ConfigError: both halves are on, or a value has no meaning.
    """
    if "bf16" in config and "bfloat16" in config:
        raise ConfigError("bf16 and bfloat16 are one section", where=where, fix="keep one of them")
    halves = {name: section(config, name, where) for name in ("fp16", "bf16", "bfloat16")}
    on = [name for name, part in halves.items() if flag(part.get("enabled"), f"{name}.enabled", where, default=False)]
    if len(on) > 1:
        raise ConfigError("fp16 and bf16 are both enabled", where=where, fix="enable one of them")
    if not on:
        return None, None, {}, False
    part = halves[on[0]]
    if on == ["fp16"]:
        return "fp16", *_scaling(part, where), True
    check = [
        flag(part.get(key), f"bf16.{key}", where, default=True) for key in ("check_grad_overflow", "check_overflow")
    ]
    return "bf16", None, {}, all(check)


def _scaling(part: Mapping[str, Any], where: str) -> tuple[LossScaling, dict[str, Any]]:
    static = number(part.get("loss_scale"), "fp16.loss_scale", float, where, least=0)
    if static is not None and not isfinite(static):
        raise ConfigError(f"fp16.loss_scale={static} is not finite", where=where, fix="0 for a scale that is found")
    power = number(part.get("initial_scale_power"), "fp16.initial_scale_power", int, where, least=0)
    if power is not None and power > _LARGEST_POWER:
        raise ConfigError(f"fp16.initial_scale_power={power} is no finite scale", where=where, fix="16 is usual")
    window = number(part.get("loss_scale_window"), "fp16.loss_scale_window", int, where, least=1)
    hysteresis = number(part.get("hysteresis"), "fp16.hysteresis", int, where, least=1)
    minimum = number(part.get("min_loss_scale"), "fp16.min_loss_scale", float, where)
    if minimum is not None and minimum <= 0:
        raise ConfigError(f"fp16.min_loss_scale={minimum:g} is no scale", where=where, fix="more than 0; 1 is usual")
    usual = LossScaling()
    scaling = LossScaling(
        static=static or None,
        initial=usual.initial if power is None else 2.0**power,
        window=usual.window if window is None else window,
        hysteresis=usual.hysteresis if hysteresis is None else hysteresis,
        consecutive_hysteresis=flag(
            part.get("consecutive_hysteresis"), "fp16.consecutive_hysteresis", where, default=False
        ),
        minimum=usual.minimum if minimum is None else minimum,
    )
    scaler = {} if power is None else {"init_scale": scaling.initial}
    return scaling, scaler | ({} if window is None else {"growth_interval": window})


def wire_dtype(config: Mapping[str, Any], where: str) -> str | None:
    """The dtype of gradients on the wire, or ``None``."""
    wire = config.get("communication_data_type")
    if not said(wire):
        return None
    if str(wire).lower() not in _DTYPES:
        raise ConfigError(f"communication_data_type={wire!r} is not known", where=where, fix="fp32, fp16 or bf16")
    return _DTYPES[str(wire).lower()]


def grad_dtype(config: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError unless gradients accumulate in fp32."""
    wanted = section(config, "data_types", where).get("grad_accum_dtype")
    if said(wanted) and _DTYPES.get(str(wanted)) != "fp32":
        raise ConfigError(
            f"data_types.grad_accum_dtype={wanted!r} is not served", where=where, fix="gradients accumulate in fp32"
        )
