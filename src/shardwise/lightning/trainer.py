"""The strategy for Lightning's Trainer: its loops and plugins stay, the LightningModule is sharded in place.

It is Lightning's own strategy for one process per device, with its launchers and collectives. What is changed: the
module is not wrapped; a step of it is a forward of the sharded module; checkpoints are written from the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise import checkpoint as checkpoints_of_shardwise
from shardwise import device as devices
from shardwise.engine.build import no_sync
from shardwise.engine.hooks import engine_of
from shardwise.engine.manual import run_as_forward
from shardwise.engine.optimizer import attach
from shardwise.engine.select import UnitRule
from shardwise.errors import ConfigError
from shardwise.lightning import by_hand, checkpoints, packages, precision, sharding
from shardwise.strategy import Strategy

_Base: Any = packages.trainer("strategies").DDPStrategy
_LightningOptimizer = packages.trainer("core.optimizer").LightningOptimizer
_plugins = packages.trainer("plugins.precision")
_FITTING = packages.trainer("trainer.states").TrainerFn.FITTING


class ShardwiseStrategy(_Base):
    """``Trainer(strategy=ShardwiseStrategy("zero3,offload_optimizer=nvme"))``; ``Fabric(strategy=...)`` takes it, too.

    Args:
        strategy: a preset, its string form or a :class:`shardwise.Strategy`; ``zero3`` by default. What ``shardwise
            launch --strategy`` says wins over it. Under ``precision="bf16-mixed"`` and ``"16-mixed"`` parameters are in
            that dtype, beside master values, unless it names a ``param_dtype`` itself.
        units: which subtrees are gathered together; see :func:`shardwise.fully_shard`.
        param_init_fn: fills modules that ``configure_model`` built on the meta device; see there.
        state_dict_type: ``sharded``: a checkpoint is a folder of :mod:`shardwise.checkpoint`, written by all ranks.
            ``full``: rank 0 gathers everything into one of Lightning's files. Both load under every strategy.
        sync_each_batch: reduce gradients after every micro-batch of an accumulation window. That keeps split ones
            split; otherwise each rank has whole ones until the window ends, and they are sent once.
        start_method: how the Trainer starts its processes, if nobody else did: ``popen``, ``spawn``, ``fork``,
            ``forkserver``.

    The others are those of Lightning's own strategies.

    Raises:
        ConfigError: an argument, a precision or a version of Lightning that is not served.
        StrategyError: see :class:`shardwise.Strategy`.
    """

    strategy_name = "shardwise"
    model: Any

    def __init__(
        self,
        strategy: str | Strategy | None = None,
        *,
        units: UnitRule = None,
        param_init_fn: Callable[[nn.Module], Any] | None = None,
        state_dict_type: str = "sharded",
        sync_each_batch: bool = False,
        start_method: str = "popen",
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        **unknown: Any,
    ) -> None:
        self.options = sharding.options_of(strategy, units, param_init_fn, state_dict_type, sync_each_batch, unknown)
        self._restored_here = False
        sharding.check_checkpoint_io(checkpoint_io, self.options)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )
        self._precision: Any = None  # Fabric looks at it

    # --- plugins -----------------------------------------------------------------------------
    @property
    def precision_plugin(self) -> Any:
        """Lightning's own plugin, which clips as every strategy of Shardwise does."""
        return _Base.precision_plugin.fget(self)

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        if plugin is not None:
            sharding.check_precision(plugin)
            precision.clip_here(plugin, _plugins.Precision)
        self._precision_plugin = plugin

    @property
    def checkpoint_io(self) -> Any:
        """What reads and writes files of Lightning's."""
        return _Base.checkpoint_io.fget(self)

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        sharding.check_checkpoint_io(io, self.options)
        self._checkpoint_io = io

    @property
    def precision(self) -> Any:
        """What Fabric sets: from there on this is a strategy for Fabric."""
        return self._precision

    @precision.setter
    def precision(self, plugin: Any) -> None:
        from shardwise.lightning.fabric import become

        become(self, plugin)

    # --- processes ---------------------------------------------------------------------------
    def setup_distributed(self) -> None:
        """Meet the other ranks."""
        make_group = super().setup_distributed
        packages.fabric("utilities.seed").reset_seed()
        self.set_world_ranks()
        sharding.meet(self.root_device, self.num_nodes * self.num_processes, make_group)

    def _get_process_group_backend(self) -> str:
        ranks = self.num_nodes * self.num_processes
        return self._process_group_backend or devices.backend(self.root_device, ranks)

    # --- the module --------------------------------------------------------------------------
    def setup(self, trainer: Any) -> None:
        """Shard the module, and let it build its optimizers."""
        fitting = trainer.state.fn == _FITTING
        self.accelerator.setup(trainer)
        module = self.lightning_module
        if engine_of(module) is None:
            if fitting and self._layer_sync:
                self.model = self._layer_sync.apply(self.model)
            self.model = self.precision_plugin.convert_module(self.model)
            self.model_to_device()
        manual = not module.automatic_optimization
        if sharding.shard(module, self.options, self.precision_plugin, by_hand.units if manual else None) and manual:
            by_hand.keep_own_values(module)
        self._reset_optimizers_and_schedulers()
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        for optimizer in self.optimizers:
            attach(optimizer)  # one that cannot step on shards says so now

    def model_to_device(self) -> None:
        """Move what has values; what has none gets them there."""
        sharding.to_device(self.lightning_module, self.root_device)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Around ``configure_model`` and ``trainer.init_module()``: on this rank's device, or, empty, on none yet."""
        place: Any = torch.device("meta") if empty_init else self.root_device
        with place, self.precision_plugin.tensor_init_context():
            yield

    # --- steps -------------------------------------------------------------------------------
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A forward of the sharded module; under manual optimization, whatever it does with its parts."""
        return self._step("training_step", self.precision_plugin.train_step_context(), args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """A forward of the sharded module."""
        return self._step("validation_step", self.precision_plugin.val_step_context(), args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """A forward of the sharded module."""
        return self._step("test_step", self.precision_plugin.test_step_context(), args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """A forward of the sharded module."""
        return self._step("predict_step", self.precision_plugin.predict_step_context(), args, kwargs)

    def _step(self, name: str, context: AbstractContextManager[Any], args: Any, kwargs: Any) -> Any:
        module = self.lightning_module
        method, engine = getattr(module, name), engine_of(module)
        with context:
            if name == "training_step" and not module.automatic_optimization:
                if engine is not None:
                    engine.before_forward()
                return method(*args, **kwargs)
            return run_as_forward(module, method, args, kwargs)

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """Before the end of an accumulation window gradients wait on their rank."""
        module = self.lightning_module
        if self.options.sync_each_batch or engine_of(module) is None:
            return nullcontext()
        return no_sync(module)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The closure first, then the step: an update that takes place later cannot wait for a closure inside of it."""
        plugin = self.precision_plugin
        if not precision.steps_in_the_usual_way(plugin, (_plugins.Precision, _plugins.MixedPrecision)):
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        result = plugin._wrap_closure(model or self.lightning_module, optimizer, closure)
        optimizer.step(**kwargs)
        return result

    # --- checkpoints -------------------------------------------------------------------------
    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Values are loaded into shards."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Is optimizer state in what :meth:`load_checkpoint` returned?"""
        return not self._restored_here

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """For a file of Lightning's: whole values, on rank 0."""
        if self.options.state_dict_type == "sharded":
            return checkpoints.OnRanks()
        return checkpoints_of_shardwise.full_state_dict(self.lightning_module, rank0_only=True)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """For a file of Lightning's: whole state, on rank 0."""
        if self.options.state_dict_type == "sharded":
            return checkpoints.OnRanks()
        if isinstance(optimizer, _LightningOptimizer):
            optimizer = optimizer._optimizer
        return checkpoints_of_shardwise.full_optimizer_state(optimizer, rank0_only=True)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder from the shards, or one file."""
        if self.options.state_dict_type == "full":
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise ConfigError(
                "storage options have no part in a checkpoint of shards",
                where="ShardwiseStrategy",
                fix="leave them out, or state_dict_type='full'",
            )
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        changed = checkpoint.get("state_dict"), *checkpoint.get("optimizer_states", ())
        if any(not isinstance(value, checkpoints.OnRanks) for value in changed):
            raise ConfigError(
                "on_save_checkpoint has put other weights or other optimizer state into the checkpoint",
                where="ShardwiseStrategy",
                fix="state_dict_type='full', or keep them under a key of your own",
            )
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []
        info = {"epoch": rest.get("epoch"), "step": rest.get("global_step")}
        checkpoints.save(self.broadcast(filepath), [self.lightning_module], optimizers, rest, info)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder into the shards, or read one of Lightning's files, whoever wrote it."""
        path = Path(self.broadcast(checkpoint_path)) if "://" not in str(checkpoint_path) else checkpoint_path
        self._restored_here = isinstance(path, Path) and checkpoints.kind_of(path) != "file"
        if not self._restored_here:
            read = super().load_checkpoint
            return read(path) if weights_only is None else read(path, weights_only=weights_only)
        module = self.lightning_module
        fitting = module.trainer.state.fn == _FITTING
        return checkpoints.load(
            path,
            [module],
            self.optimizers if fitting else None,
            strict=module.strict_loading,
            weights_only=weights_only,
        )

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """From one of Lightning's files; from a folder the values are here already."""
        if not self._restored_here:
            super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """From one of Lightning's files: each rank takes its part."""
        checkpoints.load_whole_optimizers(self.optimizers, checkpoint["optimizer_states"])

    def teardown(self) -> None:
        """The module stays sharded, where it is."""
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


packages.fabric("strategies").Strategy.register(ShardwiseStrategy)
