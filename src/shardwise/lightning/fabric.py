"""The strategy for Fabric: loops are the script's own; ``fabric.setup`` shards in place, and ``fabric.save`` and
``fabric.load`` are checkpoints of shards.

``shardwise.lightning.ShardwiseStrategy`` becomes this one when Fabric takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise import checkpoint as checkpoints_of_shardwise
from shardwise import device as devices
from shardwise.engine.build import no_sync
from shardwise.engine.clip import clip_grad_norm_, clip_grad_value_
from shardwise.engine.hooks import engine_of
from shardwise.engine.optimizer import attach
from shardwise.errors import CheckpointError, ConfigError
from shardwise.fsdp import register_fsdp_forward_method
from shardwise.lightning import checkpoints, packages, precision, sharding

_Base: Any = packages.fabric("strategies").DDPStrategy
_SyncBase: Any = packages.fabric("strategies.strategy")._BackwardSyncControl
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class _SyncControl(_SyncBase):
    """``fabric.no_backward_sync(model)``."""

    def __init__(self, each_batch: bool) -> None:
        self.each_batch = each_batch

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[None]:
        """Gradients stay on their rank until the first backward outside."""
        return no_sync(module) if enabled and not self.each_batch else nullcontext()


class FabricStrategy(_Base):
    """What :class:`~shardwise.lightning.trainer.ShardwiseStrategy` is for Fabric."""

    options: sharding.Options

    @property
    def precision(self) -> Any:
        """Lightning's own plugin."""
        return _Base.precision.fget(self)

    @precision.setter
    def precision(self, plugin: Any) -> None:
        if plugin is not None:
            sharding.check_precision(plugin)
        self._precision = plugin

    @property
    def checkpoint_io(self) -> Any:
        """What reads and writes files of Lightning's."""
        return _Base.checkpoint_io.fget(self)

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        sharding.check_checkpoint_io(io, self.options)
        self._checkpoint_io = io

    # --- processes ---------------------------------------------------------------------------
    def _setup_distributed(self) -> None:
        make_group = super()._setup_distributed
        self._set_world_ranks()
        sharding.meet(self.root_device, self.num_nodes * self.num_processes, make_group)

    def _get_process_group_backend(self) -> str:
        ranks = self.num_nodes * self.num_processes
        return self._process_group_backend or devices.backend(self.root_device, ranks)

    # --- the module --------------------------------------------------------------------------
    def module_to_device(self, module: nn.Module) -> None:
        """Move what has values; what has none gets them there."""
        if engine_of(module) is None:
            sharding.to_device(module, self.root_device)

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Around ``Net()`` in ``with fabric.init_module():``. Empty: on no device yet."""
        if not empty_init:
            return super().module_init_context(empty_init)
        stack = super().module_init_context(False)
        stack.enter_context(torch.device("meta"))
        return stack

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard it in place. A LightningModule's steps have its values, too."""
        if sharding.shard(module, self.options, self.precision, None):
            for name in _STEPS:
                if callable(getattr(module, name, None)):
                    register_fsdp_forward_method(module, name)
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """One that cannot step on shards says so now."""
        attach(optimizer)
        return optimizer

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> torch.Tensor:
        """By the norm over all ranks; the same bits under every strategy."""
        self.precision.unscale_gradients(optimizer)
        return clip_grad_norm_(precision.parameters_of(optimizer), max_norm, norm_type, error_if_nonfinite)

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Every element on its own."""
        self.precision.unscale_gradients(optimizer)
        clip_grad_value_(precision.parameters_of(optimizer), clip_val)

    # --- checkpoints -------------------------------------------------------------------------
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Whole values, on rank 0."""
        return checkpoints_of_shardwise.full_state_dict(module, rank0_only=True)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole state, on rank 0."""
        return checkpoints_of_shardwise.full_optimizer_state(optimizer, rank0_only=True)

    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write a folder from the shards, or one file."""
        if self.options.state_dict_type == "full":
            super().save_checkpoint(path, state, storage_options, filter)
            return
        if storage_options is not None or filter:
            raise ConfigError(
                "filters and storage options have no part in a checkpoint of shards",
                where="fabric.save",
                fix="leave them out, or ShardwiseStrategy(..., state_dict_type='full')",
            )
        models, optimizers, others = _divided(state)
        rest = {key: value.state_dict() if _stateful(value) else value for key, value in others.items()}
        info = {"models": list(models), "optimizers": list(optimizers)}
        checkpoints.save(self.broadcast(path), list(models.values()), list(optimizers.values()), rest, info)

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a folder into what ``state`` names, or one of Lightning's files, whoever wrote it.

        Raises:
            CheckpointError: it does not fit, or a file is asked for without saying into what.
        """
        target = Path(self.broadcast(path)) if "://" not in str(path) else path
        if not isinstance(target, Path) or checkpoints.kind_of(target) == "file":
            return self._load_file(target, state, strict, weights_only)
        if not isinstance(state, dict) or not state:
            raise CheckpointError(
                "a checkpoint of shards is loaded into something", where=str(target),
                fix="fabric.load(path, {'model': model, ...}) with the keys it was saved with",
            )  # fmt: skip
        models, optimizers, others = _divided(state)
        rest = checkpoints.load(
            target,
            checkpoints.in_saved_order(target, "models", models),
            checkpoints.in_saved_order(target, "optimizers", optimizers) or None,
            strict=strict,
            weights_only=weights_only,
        )
        for key, value in others.items():
            if key not in rest:
                if strict:
                    raise KeyError(f"the checkpoint has no '{key}': it has {sorted(rest)}; strict=False leaves it out")
                continue
            if _stateful(value):
                value.load_state_dict(rest.pop(key))
            else:
                state[key] = rest.pop(key)
        return dict(rest)

    def _load_file(self, path: Any, state: Any, strict: bool, weights_only: bool | None) -> dict[str, Any]:
        optimizers = _divided(state)[1] if isinstance(state, dict) else {}
        if not optimizers:
            return super().load_checkpoint(path, state, strict, weights_only)
        left = {key: value for key, value in state.items() if key not in optimizers}
        rest = super().load_checkpoint(path, left or None, strict, weights_only)
        state.update(left)
        for key, optimizer in optimizers.items():
            if key in rest:
                checkpoints_of_shardwise.load_full_optimizer_state(optimizer, rest.pop(key))
            elif strict:
                raise KeyError(f"the checkpoint has no '{key}'; strict=False leaves it out")
        return dict(rest)


def become(strategy: Any, plugin: Any) -> None:
    """Fabric has taken a strategy that was a Trainer's: make it one of Fabric's.

    Args:
        plugin: the precision that Fabric gives it.
    """
    options, method = strategy.options, strategy._start_method
    given = {
        name: getattr(strategy, f"_{name}", None)
        for name in ("accelerator", "parallel_devices", "checkpoint_io", "process_group_backend")
    }
    environment = strategy.cluster_environment
    vars(strategy).clear()
    strategy.__class__ = FabricStrategy
    strategy.options = options
    _Base.__init__(strategy, **given, cluster_environment=environment, precision=plugin, start_method=method)
    strategy._backward_sync_control = _SyncControl(options.sync_each_batch)


def _stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _divided(state: dict[str, Any]) -> tuple[dict[str, nn.Module], dict[str, Optimizer], dict[str, Any]]:
    """Modules, optimizers and what else a state has."""
    models = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
    others = {key: value for key, value in state.items() if key not in models and key not in optimizers}
    return models, optimizers, others
