"""Plugins: descriptions of a run in another library's words, and the strategy that each one means."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from shardwise.compat.deepspeed_plugin import DeepSpeedPlugin
from shardwise.compat.fsdp_plugin import FullyShardedDataParallelPlugin
from shardwise.engine.select import UnitRule
from shardwise.errors import WrongPlugin
from shardwise.strategy import Strategy

__all__ = ["DeepSpeedPlugin", "FullyShardedDataParallelPlugin", "own_plugin", "strategy_of_plugin"]


def own_plugin(plugin: Any) -> DeepSpeedPlugin | FullyShardedDataParallelPlugin:
    """A plugin of this library from one of Accelerate's, or from an object that holds a DeepSpeed configuration.

    Args:
        plugin: told by its fields, not by its class: other libraries need not be importable.

    Raises:
        WrongPlugin: it is nothing of the kind.
        ConfigError: it asks for something which is not done here.
    """
    if isinstance(plugin, (DeepSpeedPlugin, FullyShardedDataParallelPlugin)):
        return plugin
    if isinstance(getattr(plugin, "deepspeed_config", None), dict):
        own = DeepSpeedPlugin(hf_ds_config=_without_defaults(plugin.deepspeed_config))
        own.transformer_moe_cls_names = getattr(plugin, "transformer_moe_cls_names", None)
        return own
    if isinstance(getattr(plugin, "config", None), dict):  # transformers' HfDeepSpeedConfig
        return DeepSpeedPlugin(hf_ds_config=plugin)
    if hasattr(plugin, "sharding_strategy") or hasattr(plugin, "reshard_after_forward"):
        names = [f.name for f in fields(FullyShardedDataParallelPlugin)]
        return FullyShardedDataParallelPlugin(**{n: getattr(plugin, n) for n in names if hasattr(plugin, n)})
    raise WrongPlugin(
        f"{type(plugin).__name__} is not a plugin that is known here",
        fix="give a DeepSpeedPlugin, a FullyShardedDataParallelPlugin, or strategy='...'",
    )


def strategy_of_plugin(plugin: Any) -> tuple[Strategy, UnitRule]:
    """(strategy, rule for units) that a plugin means; see :func:`own_plugin`.

    Raises:
        ConfigError, StrategyError: it cannot be served.
    """
    own = own_plugin(plugin)
    return own.to_strategy(), own.units


def _without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Accelerate writes ``steps_per_print`` as infinity; everything else goes as it is."""
    return {key: value for key, value in config.items() if key != "steps_per_print"}
