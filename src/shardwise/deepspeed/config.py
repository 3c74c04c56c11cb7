"""``DeepSpeedConfig`` and the arguments that scripts add to their parsers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

from shardwise.comm import World
from shardwise.deepspeed_config import DsFacts, load_ds_config, read_ds_config, resolved_batch
from shardwise.errors import ConfigError

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigError", "add_config_arguments"]

DeepSpeedConfigError = ConfigError
"""What a configuration with an error in it raises."""


class DeepSpeedConfig:
    """A configuration, read and checked.

    Args:
        config: a dict, the path of a JSON file, or the object in URL-safe base64.
        mpu: an object with ``get_data_parallel_world_size``: how many ranks have batches of their own.
        mesh_device: accepted; batches are counted over all ranks.

    Attributes:
        config: the configuration as a dict of its own.
        facts: what it says.
        train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps: all three, also those that
            follow from the others.
        zero_optimization_stage, zero_enabled, gradient_clipping, steps_per_print, wall_clock_breakdown,
        optimizer_name, optimizer_params, scheduler_name, scheduler_params, dataloader_drop_last, gradient_allreduce_op,
        prescale_gradients, gradient_predivide_factor, world_size: as their names say.
        zero_config, float16_config, bfloat16_config, monitor_config: the sections, with values as attributes.

    Raises:
        ConfigError: see :func:`shardwise.deepspeed_config.read_ds_config`; or batch sizes that do not agree.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        self.config, self.where = load_ds_config(config)
        self.facts: DsFacts = read_ds_config(self.config, self.where)
        ranks = getattr(mpu, "get_data_parallel_world_size", None)
        self.world_size: int = World.current().size if ranks is None else int(ranks())
        batch = resolved_batch(self.facts, self.world_size, self.where)
        self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps = batch
        facts = self.facts
        self.zero_optimization_stage = facts.stage or 0
        self.zero_enabled = self.zero_optimization_stage > 0
        self.gradient_clipping = facts.clipping or 0.0
        self.steps_per_print, self.wall_clock_breakdown = facts.steps_per_print, facts.wall_clock
        self.dataloader_drop_last, self.gradient_allreduce_op = facts.drop_last, facts.reduce_op
        self.prescale_gradients, self.gradient_predivide_factor = facts.prescale
        self.optimizer_name, self.optimizer_params = _pair(facts.optimizer)
        self.scheduler_name, self.scheduler_params = _pair(facts.scheduler)
        self.monitor_config = MappingProxyType(facts.monitors)
        scaling = facts.loss_scale
        self.float16_config = SimpleNamespace(
            enabled=facts.param_dtype == "fp16",
            loss_scale=0 if scaling is None else scaling.static or 0,
            **({} if scaling is None else {
                "loss_scale_window": scaling.window, "hysteresis": scaling.hysteresis,
                "min_loss_scale": scaling.minimum,
            }),
        )  # fmt: skip
        self.bfloat16_config = SimpleNamespace(enabled=facts.param_dtype == "bf16")
        self.zero_config = _namespace(self.config.get("zero_optimization"))
        self.zero_config.stage = self.zero_optimization_stage

    def __repr__(self) -> str:
        sizes = f"{self.train_batch_size} = {self.train_micro_batch_size_per_gpu} * {self.gradient_accumulation_steps}"
        return f"DeepSpeedConfig({self.where}: {self.facts.preset}, batch {sizes} * {self.world_size} ranks)"


def _pair(said: tuple[str, dict[str, Any]] | None) -> tuple[str | None, dict[str, Any] | None]:
    return (None, None) if said is None else said


def _namespace(part: Any) -> SimpleNamespace:
    found = part if isinstance(part, Mapping) else {}
    return SimpleNamespace(**{k: _namespace(v) if isinstance(v, Mapping) else v for k, v in found.items()})


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config`` to a parser, with the names they had before.

    Args:
        parser: gets a group of its own for them. Arguments it has already stay as they are.

    Returns:
        The same parser.
    """
    group = parser.add_argument_group("DeepSpeed", "what shardwise.deepspeed reads")
    there = {option for action in parser._actions for option in action.option_strings}
    for name, what in (("deepspeed", "use the engine (for the script; nothing here asks)"), ("deepscale", None)):
        if f"--{name}" not in there:
            group.add_argument(f"--{name}", action="store_true", default=False, help=what or argparse.SUPPRESS)
    for name, what in (("deepspeed_config", "the configuration, a JSON file"), ("deepscale_config", None)):
        if f"--{name}" not in there:
            group.add_argument(f"--{name}", type=str, default=None, help=what or argparse.SUPPRESS)
    return parser
