"""``initialize``: a model, an optimizer and a configuration become an engine."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shardwise.checkpoint.coordination import CollectiveBlock
from shardwise.comm import World
from shardwise.deepspeed.agreement import check_agreement, what_must_agree
from shardwise.deepspeed.comm import init_distributed
from shardwise.deepspeed.engine import DeepSpeedEngine, engine_for
from shardwise.deepspeed.zero.leaf import LEAF, apply_leaf_config, leaf_units
from shardwise.deepspeed_config import DsFacts, load_ds_config, read_ds_config, resolved_batch
from shardwise.engine.build import shard
from shardwise.engine.elementwise import check, needs_whole_tensors
from shardwise.engine.hooks import engine_of
from shardwise.engine.move import move
from shardwise.engine.optimizer import attach
from shardwise.environment import DEEPSPEED_CONFIG, local_rank, strategy_from_environment
from shardwise.errors import ConfigError, OptimizerError, UnitError
from shardwise.strategy import Strategy


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Shard a model as a DeepSpeed configuration says, and wrap it in an engine. A collective.

    The model stays the object that it is, and is sharded in place.

    Args:
        args: what a script parsed; its ``deepspeed_config`` and ``local_rank`` count.
        model: any module. One that is sharded already stays as it is.
        optimizer: a torch optimizer, or what makes one of the parameters; in place of the configuration's.
        model_parameters: parameters or groups of them for the optimizer; by default all of the model's that train.
        training_data: a dataset, to get a loader of micro-batches.
        lr_scheduler: a scheduler of the optimizer, or what makes one of it; in place of the configuration's.
        distributed_port: where the ranks meet, if the launcher did not say.
        mpu: of model parallelism. Accepted if it says that there is none.
        dist_init_required: ``False``: the process group has to be there already.
        collate_fn: for the loader.
        config: a dict, or the path of a JSON file; ``config_params`` is an older name of it.
        mesh_param: ranks of data and sequence parallelism. Accepted if all are of data parallelism.

    Returns:
        The engine, its optimizer, the loader and the scheduler; ``None`` for what there is not.

    Raises:
        ConfigError: the configuration, or one that contradicts the arguments; another rank has such an error, or was
            given something else.
        OptimizerError: an optimizer that does not hold the model's parameters, or cannot train it sharded.
        UnitError: see :func:`shardwise.fully_shard`.

    Cost: sends the model's parameters once.
    """
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    world = World.current()
    with CollectiveBlock("initialize", raises=ConfigError) as ranks:
        _check_model(model)
        assert model is not None
        _refuse_model_parallelism(mpu, mesh_param, world.size)
        raw, where = load_ds_config(_config_of(args, config, config_params))
        facts = read_ds_config(raw, where)
        batch = resolved_batch(facts, world.size, where)
        inner = _optimizer_of(model, optimizer, model_parameters, facts, where)
        scheduler = _scheduler_of(inner, lr_scheduler, facts, where)
        said = what_must_agree(model, inner, scheduler, facts, batch)
        ranks.mine = json.dumps(said).encode()
    check_agreement([json.loads(text) for text in ranks.gathered])
    if facts.idle and world.rank == 0:
        warnings.warn(f"{where}: these have no effect here: {', '.join(facts.idle)}", stacklevel=2)
    client_optimizer, client_scheduler = optimizer, lr_scheduler
    strategy = _shard(model, inner, facts)
    if inner is not None:
        attach(inner)
    engine = DeepSpeedEngine(
        model, inner, scheduler, facts, raw, batch, strategy, world.device, collate_fn, _local_rank(args),
    )  # fmt: skip
    engine.client_optimizer, engine.client_lr_scheduler, engine.mpu = client_optimizer, client_scheduler, mpu
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data)
    if facts.compile is not None and facts.compile.get("enabled"):
        engine.compile(facts.compile.get("backend", "inductor"), facts.compile.get("kwargs"))
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UnitError(f"a model is a torch module, not a {type(model).__name__}", where="initialize")
    if isinstance(model, DeepSpeedEngine):
        raise UnitError("it is an engine already", where="initialize(model=...)", fix="use it, or pass its module")
    if engine_for(model) is not None:
        raise UnitError(
            "it has an engine already",
            where=type(model).__name__,
            fix="use that one, or call its destroy() first",
        )


def _config_of(args: Any, config: Any, config_params: Any) -> Any:
    """The one place that names the configuration."""
    given = {
        "config=": config,
        "config_params=": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
        "args.deepscale_config": getattr(args, "deepscale_config", None),
    }
    said = [name for name, value in given.items() if value is not None]
    launched = os.environ.get(DEEPSPEED_CONFIG)
    if not said and launched:  # by 'shardwise launch --deepspeed-config'
        return launched
    if len(said) != 1:
        what = "no configuration" if not said else f"{len(said)} configurations: {' and '.join(said)}"
        raise ConfigError(
            what, where="initialize", fix="pass config=, a dict or the path of a JSON file, or --deepspeed_config"
        )
    return given[said[0]]


def _refuse_model_parallelism(mpu: Any, mesh_param: Any, ranks: int) -> None:
    size = 1
    if mpu is not None:
        for name in ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size"):
            if callable(ask := getattr(mpu, name, None)):
                size = max(size, int(ask()))
    if mesh_param is not None:
        data_ranks: int = next(iter(mesh_param))
        size = max(size, ranks // max(data_ranks, 1))
    if size > 1:
        raise ConfigError(
            f"{size} ranks share one copy of a batch (mpu= or mesh_param=)",
            where="initialize",
            fix="leave it out: every rank has batches of its own, and models are split by the ZeRO stage",
        )


def _local_rank(args: Any) -> int:
    given = getattr(args, "local_rank", None)
    return local_rank(int(given) if given is not None and int(given) >= 0 else 0)


def _optimizer_of(
    model: nn.Module, given: Any, parameters: Iterable[Any] | None, facts: DsFacts, where: str
) -> Optimizer | None:
    """The torch optimizer to use: the script's, made by the script, or the configuration's."""
    if given is None and facts.optimizer is None:
        return None
    wanted = list(parameters) if parameters is not None else [p for p in model.parameters() if p.requires_grad]
    inner: Any
    if given is None:
        from shardwise.deepspeed.ops.building import build_optimizer

        assert facts.optimizer is not None
        inner = build_optimizer(facts.optimizer[0], wanted, facts.optimizer[1], model=model)
    else:
        if not callable(given) and not isinstance(given, Optimizer):
            raise OptimizerError(
                f"optimizer= is a {type(given).__name__}",
                where="initialize",
                fix="pass a torch.optim.Optimizer, or a function of the parameters that returns one",
            )
        inner = getattr(given, "optimizer", given) if isinstance(given, Optimizer) else given(wanted)
    if not isinstance(inner, Optimizer):
        raise OptimizerError(
            f"optimizer= made a {type(inner).__name__}, where a torch optimizer is needed",
            where="initialize",
            fix="pass a torch.optim.Optimizer, or a function of the parameters that returns one",
        )
    inner.param_groups[:] = [group for group in inner.param_groups if group["params"]]
    own = {id(p) for p in model.parameters()}
    held = [id(p) for group in inner.param_groups for p in group["params"]]
    if own and not any(key in own for key in held):
        raise OptimizerError(
            f"{type(inner).__name__} holds no parameter of {type(model).__name__}",
            where="initialize",
            fix="build it from model.parameters(), after the last change of the model that replaces parameters",
        )
    return inner


def _shard(model: nn.Module, optimizer: Optimizer | None, facts: DsFacts) -> Strategy:
    """Shard the model, unless somebody has: in its dtypes of now, which the optimizer keeps as master values."""
    found = engine_of(model)
    if found is not None:
        return found.strategy
    strategy = strategy_from_environment(Strategy(**facts.strategy_arguments()))
    if optimizer is not None:
        check(optimizer, [])
        if needs_whole_tensors(optimizer):
            strategy = strategy.replace(layout="tensor")
    units = None
    if facts.leaf_modules or any(getattr(module, LEAF, False) for module in model.modules()):
        apply_leaf_config(model, facts.leaf_modules)
        units = leaf_units(model)
    move(model, World.current().device)
    if any(True for _ in model.parameters()):
        shard(model, strategy, units=units)
        if strategy.split_params:
            from shardwise.deepspeed.zero.probes import mark

            mark(model)  # other libraries ask parameters whether their values are all here
    return strategy


def _scheduler_of(optimizer: Optimizer | None, given: Any, facts: DsFacts, where: str) -> Any:
    if given is not None:
        if optimizer is None:
            raise ConfigError("lr_scheduler= without an optimizer", where="initialize", fix="pass optimizer= too")
        if isinstance(given, type) or (callable(given) and not hasattr(given, "step")):
            given = given(optimizer)
            if given is None:
                return None
        if not hasattr(given, "step"):
            raise ConfigError(
                f"lr_scheduler= is a {type(given).__name__}, which has no step()",
                where="initialize",
                fix="pass a scheduler, or a function of the optimizer that returns one",
            )
        its = getattr(given, "optimizer", optimizer)
        if its is not optimizer and getattr(its, "optimizer", None) is not optimizer:
            raise ConfigError(
                f"lr_scheduler= changes the rates of another {type(its).__name__} than the one that steps",
                where="initialize",
                fix="build it from the optimizer that is passed in, or pass a function of the optimizer",
            )
        return given
    if facts.scheduler is None or optimizer is None:
        return None
    from shardwise.deepspeed.runtime.lr_schedules import build_scheduler

    return build_scheduler(facts.scheduler[0], optimizer, facts.scheduler[1])
