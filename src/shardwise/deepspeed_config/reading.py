"""Read a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.deepspeed_config import zero
from shardwise.deepspeed_config.batch import check_batch
from shardwise.deepspeed_config.check import DOORS, check_keys
from shardwise.deepspeed_config.facts import DsFacts
from shardwise.deepspeed_config.precision import grad_dtype, precision, wire_dtype
from shardwise.deepspeed_config.tables import TABLES
from shardwise.deepspeed_config.values import AUTO, flag, number, said, section
from shardwise.errors import ConfigError, InternalError, did_you_mean

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_MONITORS = ("tensorboard", "wandb", "comet", "csv_monitor")


def read_ds_config(config: Mapping[str, Any], where: str = "DeepSpeed configuration", door: str = DOORS[0]) -> DsFacts:
    """What ``config`` says.

    Args:
        config: as :func:`~shardwise.deepspeed_config.load_ds_config` gives it.
        where: where it came from, for errors.
        door: ``deepspeed``; or ``accelerate``, whose scripts build optimizers and trackers by themselves, so that
            less is served, and which fills ``"auto"`` in itself.

    Raises:
        ConfigError: a key that is unknown, or that asks for something which is not done here; values that
            contradict each other.
    """
    if door not in DOORS:
        raise InternalError(f"no door {door!r}")
    checked = check_keys(config, door, where)
    train, micro, steps = (number(config.get(name), name, int, where) for name in _BATCH)
    check_batch((train, micro, steps), where)
    dtype, scaling, scaler, check_overflow = precision(config, where)
    grad_dtype(config, where)
    saved = section(config, "activation_checkpointing", where)
    return DsFacts(
        **zero.states(config, where),
        offload_activations="cpu" if said(saved.get("cpu_checkpointing")) else "device",
        param_dtype=dtype,
        reduce_dtype=wire_dtype(config, where),
        train_batch=train,
        micro_batch=micro,
        accumulation=steps,
        managed_accumulation=flag(
            config.get("managed_gradient_accumulation"), "managed_gradient_accumulation", where, default=True
        ),
        drop_last=flag(config.get("dataloader_drop_last"), "dataloader_drop_last", where, default=False),
        optimizer=_typed(config, "optimizer", where),
        scheduler=_typed(config, "scheduler", where),
        clipping=number(config.get("gradient_clipping"), "gradient_clipping", float, where, least=0) or None,
        loss_scale=scaling,
        check_overflow=check_overflow,
        scaler=scaler,
        reduce_op=_choice(config, "gradient_allreduce_op", ("mean", "sum"), where),
        prescale=_prescale(config, where),
        steps_per_print=_steps_per_print(config, where),
        wall_clock=flag(config.get("wall_clock_breakdown"), "wall_clock_breakdown", where, default=False),
        flops_profiler=_enabled(config, "flops_profiler", where),
        monitors={name: found for name in _MONITORS if (found := _enabled(config, name, where)) is not None},
        tag_validation=_choice(
            section(config, "checkpoint", where), "tag_validation", ("warn", "ignore", "fail"), where, "checkpoint."
        ),
        compile=_said(section(config, "compile", where)) or None,
        idle=tuple(checked.idle),
        unfilled=tuple(checked.unfilled),
    )


def _typed(config: Mapping[str, Any], name: str, where: str) -> tuple[str, dict[str, Any]] | None:
    """Type and arguments of an optimizer or a scheduler; arguments that are ``"auto"`` stay so."""
    part = section(config, name, where)
    if not said(part.get("type")):
        if part:
            raise ConfigError(f"{name} has no type", where=where, fix=TABLES[name]["type"].says)
        return None
    if not isinstance(part["type"], str):
        raise ConfigError(f"{name}.type={part['type']!r} is not a name", where=where, fix=TABLES[name]["type"].says)
    return part["type"], dict(section(part, "params", where, f"{name}."))


def _enabled(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any] | None:
    part = section(config, name, where)
    if not flag(part.get("enabled"), f"{name}.enabled", where, default=False):
        return None
    return {key: value for key, value in _said(part, keep_false=True).items() if key != "enabled"}


def _said(part: Mapping[str, Any], keep_false: bool = False) -> dict[str, Any]:
    return {key: value for key, value in part.items() if said(value) or (keep_false and value is False)}


def _choice(config: Mapping[str, Any], name: str, choices: tuple[str, ...], where: str, prefix: str = "") -> str:
    """One of ``choices``, whatever its case; the first one if it is not said."""
    value = config.get(name)
    if value in (None, AUTO):
        return choices[0]
    if str(value).lower() not in choices:
        raise ConfigError(
            f"{prefix}{name}={value!r} is not known",
            where=where,
            fix=did_you_mean(str(value), choices, otherwise=" or ".join(choices)),
        )
    return str(value).lower()


def _prescale(config: Mapping[str, Any], where: str) -> tuple[bool, float]:
    factor = number(config.get("gradient_predivide_factor"), "gradient_predivide_factor", float, where)
    if factor is not None and factor <= 0:
        raise ConfigError(f"gradient_predivide_factor={factor:g} divides nothing", where=where, fix="1 or more")
    on = flag(config.get("prescale_gradients"), "prescale_gradients", where, default=False)
    return on, 1.0 if factor is None else factor


def _steps_per_print(config: Mapping[str, Any], where: str) -> int | None:
    value = config.get("steps_per_print")
    if value == float("inf"):  # how Accelerate writes 'never'
        return None
    return number(value, "steps_per_print", int, where, least=0) or None
