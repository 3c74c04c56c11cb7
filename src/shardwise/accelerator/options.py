"""What an Accelerator was asked for, brought together: strategy, precision, accumulation, handlers, projects.

Several arguments can say the same thing (a strategy and a plugin, a number of steps and a plugin of steps). Each is
read here once, and two that disagree are an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.compat.dataclasses import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
    ProjectConfiguration,
)
from shardwise.compat.parallelism import ParallelismConfig
from shardwise.compat.plugins import DeepSpeedPlugin, own_plugin
from shardwise.environment import (
    DEEPSPEED_CONFIG,
    accumulation_from_environment,
    compile_from_environment,
    mixed_precision_from_environment,
    strategy_from_environment,
)
from shardwise.errors import NotServed, StrategyError, WrongPlugin
from shardwise.strategy import Strategy

_HANDLERS = (
    AutocastKwargs, DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs, ProfileKwargs,
)  # fmt: skip
_LEFT_OUT = {
    "megatron_lm_plugin": "use strategy='zero3', or tensor parallelism by torch.distributed.tensor.parallel",
    "torch_tp_plugin": "use torch.distributed.tensor.parallel on models that Shardwise does not shard",
}


@dataclass
class Chosen:
    """A strategy, and what a plugin said beside it."""

    strategy: Strategy
    units: Any = None  # a rule for fully_shard
    param_init_fn: Any = None
    accumulation: int | None = None
    max_norm: float | None = None
    scaling: dict[str, Any] = field(default_factory=dict)  # arguments of the loss scaler


def choose_strategy(
    strategy: Any, fsdp_plugin: Any, deepspeed_plugin: Any, precision: Any, parallelism: ParallelismConfig | None = None
) -> Chosen:
    """One strategy, in the launcher's or the script's precision; the launcher's DeepSpeed configuration goes before.

    Raises:
        StrategyError: more than one of the three, an unknown strategy or precision, or two that contradict.
    """
    given = {
        "strategy": strategy,
        "fsdp_plugin": fsdp_plugin,
        "deepspeed_plugin": deepspeed_plugin,
    }
    arranged = parallelism.to_strategy() if parallelism is not None and parallelism.total_size > 1 else None
    if arranged is not None and fsdp_plugin is None:
        given["parallelism_config"] = strategy = strategy if strategy is not None else arranged
    said = [name for name, value in given.items() if value is not None]
    launched = os.environ.get(DEEPSPEED_CONFIG)
    if launched:  # the launcher's word counts
        strategy, fsdp_plugin, deepspeed_plugin = None, None, DeepSpeedPlugin(launched)
    if len(said) > 1:
        raise StrategyError(f"{' and '.join(said)} say the same thing twice", fix="give one of them")
    chosen = Chosen(Strategy.parse(strategy if strategy is not None else "ddp"))
    plugin = fsdp_plugin if fsdp_plugin is not None else deepspeed_plugin
    if isinstance(plugin, dict):
        if len(plugin) != 1:
            raise StrategyError(
                f"{len(plugin)} DeepSpeed plugins for one Accelerator",
                fix="give one, and other models their own: accelerator.prepare(model, strategy='zero3')",
            )
        plugin = next(iter(plugin.values()))
    if plugin is not None:
        own = own_plugin(plugin)
        chosen.strategy, chosen.units = own.to_strategy(), own.units
        if fsdp_plugin is not None and arranged is not None:
            chosen.strategy = _arranged(chosen.strategy, arranged)
        chosen.param_init_fn = getattr(own, "param_init_fn", None)
        if isinstance(own, DeepSpeedPlugin):
            chosen.accumulation, chosen.max_norm = own.accumulation_steps, own.max_norm
            chosen.scaling = own.scaler_kwargs
    chosen.strategy = strategy_from_environment(chosen.strategy)
    wanted = mixed_precision_from_environment(
        None if precision is None else str(getattr(precision, "value", precision))
    )
    if wanted in ("fp16", "bf16"):
        if chosen.strategy.param_dtype not in (None, wanted):
            raise StrategyError(
                f"mixed_precision='{wanted}' and param_dtype={chosen.strategy.param_dtype} contradict each other",
                where=f"strategy '{chosen.strategy}'",
                fix="say it once",
            )
        chosen.strategy = chosen.strategy.in_precision(wanted)
    chosen.strategy = autocast_by_default(chosen.strategy)
    return chosen


def _arranged(strategy: Strategy, arranged: Strategy) -> Strategy:
    """A plugin's strategy on the ranks as a ParallelismConfig arranges them.

    Raises:
        StrategyError: the two contradict each other.
    """
    if strategy.preset == arranged.preset or (arranged.preset == "zero3" and strategy.preset == "zero2"):
        return strategy
    if arranged.preset == "hsdp" and strategy.preset in ("zero3", "hsdp"):
        return strategy.replace(preset="hsdp", shard_size=arranged.shard_size)
    raise StrategyError(
        f"fsdp_plugin says {strategy.preset}, parallelism_config {arranged.preset}", fix="give one of them"
    )


def autocast_by_default(strategy: Strategy) -> Strategy:
    """An Accelerator's models run under autocast in a half precision, unless the strategy says not to."""
    if strategy.autocast is None and strategy.param_dtype in ("fp16", "bf16"):
        return strategy.replace(autocast=True)
    return strategy


def choose_accumulation(
    steps: int, plugin: GradientAccumulationPlugin | None, from_strategy: int | None
) -> GradientAccumulationPlugin:
    """The accumulation plugin that the arguments amount to.

    Raises:
        StrategyError: two arguments disagree, or it is not a number of batches.
    """
    if plugin is not None and steps != 1:
        raise StrategyError(
            "gradient_accumulation_steps and gradient_accumulation_plugin say the same thing twice",
            fix="put the number into the plugin: GradientAccumulationPlugin(num_steps=...)",
        )
    said = plugin.num_steps if plugin is not None and plugin.num_steps is not None else steps
    if from_strategy is not None and said not in (1, from_strategy):
        raise StrategyError(
            f"gradient_accumulation_steps={said} here and {from_strategy} in the DeepSpeed plugin", fix="say it once"
        )
    number = accumulation_from_environment(said if from_strategy is None else from_strategy)
    if number < 1:
        raise StrategyError(f"gradient_accumulation_steps={number} is not a number of batches", fix="give 1 or more")
    return replace(plugin or GradientAccumulationPlugin(), num_steps=number)


@dataclass
class Handlers:
    """``kwargs_handlers``, by kind."""

    by_kind: dict[type, KwargsHandler] = field(default_factory=dict)

    @classmethod
    def of(cls, handlers: Sequence[KwargsHandler] | None) -> Handlers:
        """Sort them.

        Raises:
            StrategyError: two of one kind, or a kind that does not exist here.
        """
        found = cls()
        for handler in handlers or ():
            kind = next((k for k in _HANDLERS if isinstance(handler, k)), None)
            if kind is None:
                raise WrongPlugin(
                    f"kwargs_handlers holds a {type(handler).__name__}",
                    fix="give " + ", ".join(k.__name__ for k in _HANDLERS) + "; fp8 recipes are left out, use bf16",
                )
            if kind in found.by_kind:
                raise StrategyError(f"kwargs_handlers holds two {kind.__name__}", fix="give one")
            found.by_kind[kind] = handler
        return found

    def get(self, kind: type) -> Any:
        return self.by_kind.get(kind)


def choose_dataloading(
    config: DataLoaderConfiguration | None, split_batches: bool | None, even_batches: bool | None
) -> DataLoaderConfiguration:
    """The configuration, with the two arguments of the Accelerator's own in place of its values."""
    chosen = replace(config) if config is not None else DataLoaderConfiguration()
    if split_batches is not None:
        chosen.split_batches = split_batches
    if even_batches is not None:
        chosen.even_batches = even_batches
    return chosen


def choose_project(project_dir: str | os.PathLike[str] | None, config: ProjectConfiguration | None) -> Any:
    if config is None:
        return ProjectConfiguration(project_dir=None if project_dir is None else os.fspath(project_dir))
    if project_dir is not None and config.project_dir is None:
        config.set_directories(os.fspath(project_dir))
    return config


def choose_compile(backend: Any, plugin: Any) -> dict[str, Any] | None:
    """Arguments for ``module.compile``, or ``None`` to leave models as they are.

    Where the script says nothing, those that ``accelerate launch`` was given.
    """
    if backend is not None and plugin is not None:
        raise StrategyError("dynamo_backend and dynamo_plugin say the same thing twice", fix="give one of them")
    if plugin is not None:
        keywords = dict(plugin.to_kwargs())
        keywords["backend"] = plugin.backend
    elif backend is not None:
        keywords = {"backend": backend}
    elif not (keywords := compile_from_environment()):
        return None
    keywords["backend"] = str(getattr(keywords["backend"], "value", keywords["backend"])).lower()
    return None if keywords["backend"] == "no" else keywords


def refuse_left_out(**given: Any) -> None:
    """Raise for arguments that Accelerate has and this library leaves out on purpose."""
    for name, value in given.items():
        if value is not None:
            raise NotServed(f"{name} is left out of Shardwise", fix=_LEFT_OUT[name])
