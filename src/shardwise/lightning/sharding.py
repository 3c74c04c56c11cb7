"""What the strategy of a Trainer and the one of Fabric do alike: options, the world, sharding, precision."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardwise.comm import World, init
from shardwise.engine.build import device_of
from shardwise.engine.hooks import engine_of
from shardwise.engine.select import UnitRule
from shardwise.environment import mixed_precision_from_environment, strategy_from_environment
from shardwise.errors import ConfigError, UnitError, did_you_mean
from shardwise.fsdp import modules
from shardwise.strategy import Strategy

_ARGUMENTS = (
    "strategy", "units", "param_init_fn", "state_dict_type", "sync_each_batch", "start_method", "accelerator",
    "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin", "process_group_backend",
)  # fmt: skip
KINDS = ("sharded", "full")
_MIXED = {"bf16-mixed": "bf16", "16-mixed": "fp16"}
_PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", *_MIXED)


@dataclass(frozen=True)
class Options:
    """What a strategy was asked for; see :class:`~shardwise.lightning.trainer.ShardwiseStrategy`."""

    strategy: Strategy
    units: UnitRule = None
    param_init_fn: Callable[[nn.Module], Any] | None = None
    state_dict_type: str = "sharded"
    sync_each_batch: bool = False


def options_of(
    strategy: str | Strategy | None,
    units: UnitRule,
    param_init_fn: Callable[[nn.Module], Any] | None,
    state_dict_type: str,
    sync_each_batch: bool,
    unknown: Mapping[str, Any],
) -> Options:
    """Check what a script asks for.

    Raises:
        ConfigError: an argument that there is not.
        StrategyError: see :class:`shardwise.Strategy`.
    """
    if unknown:
        name = next(iter(unknown))
        fix = did_you_mean(
            name, _ARGUMENTS, f"there are {', '.join(_ARGUMENTS)}; what else a strategy says is part of its text"
        )
        raise ConfigError(f"there is no argument '{name}'", where="ShardwiseStrategy", fix=fix)
    if state_dict_type not in KINDS:
        raise ConfigError(
            f"state_dict_type={state_dict_type!r}", where="ShardwiseStrategy", fix=f"one of {', '.join(KINDS)}"
        )
    return Options(Strategy.parse(strategy), units, param_init_fn, state_dict_type, sync_each_batch)


def check_checkpoint_io(io: Any, options: Options) -> None:
    """Refuse a plugin that would have nothing to write.

    Raises:
        ConfigError: shards go to the disk without one.
    """
    if io is not None and options.state_dict_type == "sharded":
        raise ConfigError(
            f"a {type(io).__name__} has no part in checkpoints of shards",
            where="ShardwiseStrategy",
            fix="leave it out, or state_dict_type='full'",
        )


def started_elsewhere() -> bool:
    """Has a launcher said everything about this rank, as ``shardwise launch`` and torchrun do?"""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def meet(device: torch.device, size: int, make_group: Callable[[], None]) -> World:
    """Have a process group, and be known in it. One rank alone needs none.

    Args:
        device: this rank's.
        size: how many ranks there are, by what Lightning was told.
        make_group: makes one in Lightning's way, for ranks that Lightning or its cluster environment has started.

    Raises:
        ConfigError: Lightning counts other ranks than there are.
    """
    if started_elsewhere() and int(os.environ["WORLD_SIZE"]) == size:
        init(device)  # it knows what a restart of all ranks leaves behind
    elif size > 1:
        make_group()
    world = init(device)
    if world.size != size:
        raise ConfigError(
            f"there are {world.size} ranks, and Lightning was told of {size}",
            where=f"rank {world.rank}",
            fix=f"Trainer(devices=..., num_nodes=...) or Fabric(...) with {world.size} in all",
        )
    return world


def check_precision(plugin: Any) -> None:
    """Refuse precision plugins that bring a library of their own.

    Raises:
        ConfigError: it is one of those.
    """
    name, kinds = str(plugin.precision), [kind.__name__ for kind in type(plugin).__mro__]
    foreign = {"FSDPPrecision", "DeepSpeedPrecision", "XLAPrecision", "BitsandbytesPrecision"}
    if foreign & set(kinds) or name not in _PRECISIONS:
        raise ConfigError(
            f"{kinds[0]} ('{name}') is not served",
            where="ShardwiseStrategy",
            fix=f"precision= one of {', '.join(_PRECISIONS)}; int8 weights: shardwise.quantize(model)",
        )


def shard(
    module: nn.Module, options: Options, plugin: Any, more_units: Callable[[nn.Module, UnitRule], UnitRule] | None
) -> bool:
    """Shard a module in place, unless it is sharded like that already.

    Args:
        plugin: the precision plugin. Where it is a mixed one, parameters are in that dtype, beside master values.
        more_units: makes another rule of units out of that of the options.

    Returns:
        Whether it was not sharded before.

    Raises:
        UnitError: it is sharded in another way, or cannot be.
        ConfigError: the launcher says fp16, and nobody scales the loss.
    """
    said = mixed_precision_from_environment()
    if said == "fp16" and getattr(plugin, "scaler", None) is None:
        raise ConfigError(
            "'--mixed-precision fp16' needs a loss that is scaled",
            where="ShardwiseStrategy",
            fix="precision='16-mixed'",
        )
    wanted = strategy_from_environment(options.strategy)
    if said is None:
        wanted = wanted.in_precision(_MIXED.get(plugin.precision))
    engine = engine_of(module)
    if engine is not None:
        if not wanted.is_auto and engine.strategy != wanted:
            raise UnitError(
                f"{type(module).__name__} is sharded already, with '{engine.strategy}', and '{wanted}' was asked for",
                fix="go on with the same strategy and precision, or build the model anew and load a checkpoint",
            )
        return False
    if wanted.is_auto:
        from shardwise.plan import auto  # which takes a while to import

        wanted = auto.choose(module, wanted, device_of(module), None)
    units = options.units if more_units is None else more_units(module, options.units)
    modules.shard(module, wanted, None, units, options.param_init_fn, ())
    return True


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move what has values."""
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        module._apply(lambda t: t if t.is_meta else t.to(device))
    else:
        module.to(device)
