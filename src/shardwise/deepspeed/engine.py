"""The engine that ``initialize`` returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.comm import World
from shardwise.deepspeed import refused
from shardwise.deepspeed.engine_states import States
from shardwise.deepspeed.loader import DeepSpeedDataLoader
from shardwise.deepspeed.loss_scaler import LossScaler
from shardwise.deepspeed.optimizer import DeepSpeedOptimizer
from shardwise.deepspeed.reports import Reports
from shardwise.deepspeed.windows import GivenWindows
from shardwise.deepspeed_config import DsFacts
from shardwise.engine.hooks import engine_of
from shardwise.engine.uncompiled import uncompiled
from shardwise.errors import DataError
from shardwise.observe import recording
from shardwise.scheduler import AcceleratedScheduler
from shardwise.strategy import Strategy

_WORKERS = 2  # that read a dataset, as DeepSpeed has them
_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DeepSpeedEngine]] = weakref.WeakKeyDictionary()


class DeepSpeedEngine(States):
    """Trains a sharded model by DeepSpeed's calls: ``engine(batch)``, ``engine.backward(loss)``, ``engine.step()``.

    Attributes that it does not have are the model's. Made by :func:`~shardwise.deepspeed.starting.initialize`.

    Args:
        module: the model, sharded already.
        optimizer: attached already, or ``None``.
        lr_scheduler: of that optimizer, or ``None``.
        facts, config: what was asked for.
        batch: the three sizes, see :func:`~shardwise.deepspeed_config.resolved_batch`.
        strategy: what the model is sharded under.
        device: where it computes.
        collate_fn: for loaders.
        local_rank: of this process on its host.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        lr_scheduler: Any,
        facts: DsFacts,
        config: dict[str, Any],
        batch: tuple[int, int, int],
        strategy: Strategy,
        device: torch.device,
        collate_fn: Callable[..., Any] | None = None,
        local_rank: int = 0,
    ) -> None:
        super().__init__()
        world = World.current()
        self.facts, self.config, self.strategy, self.device = facts, config, strategy, device
        self.collate_fn, self.mpu = collate_fn, None
        self.client_optimizer = self.client_lr_scheduler = self.training_dataloader = None
        self.local_rank, self.global_rank, self.world_size = local_rank, world.rank, world.size
        self.micro_steps = self.global_steps = self.global_samples = self.skipped_steps = 0
        self._train_batch, self._micro_batch, length = batch
        scaler = None
        if facts.loss_scale is not None and optimizer is not None:
            scaler = LossScaler(device.type, facts.loss_scale)
        self._steps = GivenWindows(length, scaler, float(world.size) if facts.reduce_op == "sum" else 1.0)
        self._steps.max_norm = facts.clipping
        self._steps.models.append(module)
        self.module = module
        self.optimizer = None
        if optimizer is not None:
            measure = self.zero_optimization() or facts.param_dtype is not None
            self.optimizer = DeepSpeedOptimizer(optimizer, self._steps, measure, facts.check_overflow)
            self.optimizer.states = weakref.ref(self)
            self._steps.optimizers.append(self.optimizer)
        self.lr_scheduler, self._scheduler = lr_scheduler, None
        if lr_scheduler is not None and self.optimizer is not None:
            self._scheduler = AcceleratedScheduler(lr_scheduler, [self.optimizer], steps=self._steps)
        self.reports = Reports(facts, module, device, world.rank == 0, self._say)
        self.training = module.training
        _engines[module] = weakref.ref(self)
        module.register_forward_pre_hook(_before)
        module.register_forward_hook(_after)
        if self.optimizer is not None:
            self._begin_micro_batch()
        if engine_of(module) is not None:
            recording.from_environment(module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        if name in refused.NAMES:
            raise refused.error(name)
        module = self._modules.get("module") if "_modules" in self.__dict__ else None
        if module is None or not hasattr(module, name):
            raise AttributeError(f"neither DeepSpeedEngine nor its model has an attribute '{name}'")
        return getattr(module, name)

    # --- data ----------------------------------------------------------------------------------
    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DeepSpeedDataLoader:
        """A loader of this rank's batches.

        Args:
            dataset: map-style or iterable.
            batch_size: of one rank; a micro-batch by default.
            route: ``train``; ``eval`` and ``predict`` are not shuffled.
            pin_memory: page-lock batches, with an accelerator.
            data_sampler: says what this rank reads.
            collate_fn: makes a batch of samples.
            num_local_io_workers: processes that read; two by default.

        Raises:
            DataError: it is no dataset.
        """
        if not hasattr(dataset, "__getitem__") and not isinstance(dataset, torch.utils.data.IterableDataset):
            raise DataError(f"a {type(dataset).__name__} is no torch dataset", where="deepspeed_io")
        if data_sampler is None and route != "train" and hasattr(dataset, "__len__"):
            data_sampler = torch.utils.data.DistributedSampler(
                dataset, num_replicas=self.world_size, rank=self.global_rank, shuffle=False
            )
        return DeepSpeedDataLoader(
            dataset,
            self._micro_batch if batch_size is None else batch_size,
            self.world_size,
            self.global_rank,
            data_sampler,
            self.collate_fn if collate_fn is None else collate_fn,
            _WORKERS if num_local_io_workers is None else num_local_io_workers,
            pin_memory and self.device.type != "cpu",
            self.facts.drop_last,
        )

    def set_data_post_process_func(self, post_process_func: Callable[[Any], Any]) -> None:
        """Change each batch of ``training_dataloader`` by this."""
        if self.training_dataloader is not None:
            self.training_dataloader.post_process_func = post_process_func

    # --- the rest ------------------------------------------------------------------------------
    def compile(
        self,
        backend: Any = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the model with ``torch.compile``, in place. A second call does nothing.

        Args:
            backend: of torch.compile.
            compile_kwargs: its other arguments.
            schedule, compiled_autograd_enabled: DeepCompile's; refused.

        Raises:
            LeftOut: something of DeepCompile.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise refused.error("schedule" if schedule is not None else "compiled_autograd_enabled")
        if not self.is_compiled:
            self.module.compile(**{**(compile_kwargs or {}), "backend": backend})
            self.is_compiled = True

    is_compiled = False

    def destroy(self) -> None:
        """Let go of the optimizer, the scheduler and the loader. The model stays sharded and can be used."""
        if engine_for(self.module) is self:
            _engines.pop(self.module)
        self._destroyed = True
        self.reports.close()
        self._steps.drop_gradients()
        if (engine := engine_of(self.module)) is not None:
            engine.sync = True
        self._steps.optimizers.clear()
        self._steps.schedulers.clear()
        self._steps.models.clear()
        self.optimizer = self.lr_scheduler = self._scheduler = self.training_dataloader = None

    @property
    def monitor(self) -> Any:
        """Writes events to the monitors of the configuration."""
        return self.reports.monitor

    def get_data_parallel_rank(self) -> int:
        return self.global_rank

    def get_model_parallel_rank(self) -> int:
        return 0

    def empty_partition_cache(self) -> None:
        """Free values that stay gathered for the next pass."""
        if (engine := engine_of(self.module)) is not None:
            engine.rest()


def engine_for(module: nn.Module) -> DeepSpeedEngine | None:
    """The engine that trains this model."""
    found = _engines.get(module)
    return None if found is None else found()


@uncompiled
def _before(module: nn.Module, args: Any) -> None:
    engine = engine_for(module)  # a copy of the model has none
    if engine is not None:
        engine._before_forward()


@uncompiled
def _after(module: nn.Module, args: Any, output: Any) -> None:
    engine = engine_for(module)
    if engine is not None:
        engine._after_forward(output)
