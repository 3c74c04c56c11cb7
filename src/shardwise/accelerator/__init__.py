"""``Accelerator``: one training script for every strategy, in the shape of Hugging Face Accelerate's.

::

    accelerator = Accelerator(strategy="zero3", mixed_precision="bf16", gradient_accumulation_steps=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

Names mean what they mean there. Where numbers differ, it is towards the true mean: a short last accumulation
window is divided by what it holds, schedulers count optimizer steps, and weighted losses give the mean over items.

The class is put together from parts, a file each: preparing, training, numbers, saving, trackers.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from shardwise.accelerator import options
from shardwise.accelerator.base import HALVES
from shardwise.accelerator.loader_positions import KnownLoaders
from shardwise.accelerator.numbers import Numbers
from shardwise.accelerator.preparing import Preparing
from shardwise.accelerator.saving import Saving
from shardwise.accelerator.trackers import Trackers
from shardwise.accelerator.training import Training
from shardwise.comm import World, init
from shardwise.comm.world import default_device
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
from shardwise.compat.parallelism import ParallelismConfig, own_parallelism
from shardwise.observe import recording
from shardwise.state import AcceleratorState, GradientState
from shardwise.stepping import Steps
from shardwise.strategy import Strategy
from shardwise.tracking import filter_trackers

__all__ = ["Accelerator"]


class Accelerator(Preparing, Training, Numbers, Saving, Trackers):
    """Prepares models, optimizers, dataloaders and schedulers, and runs the steps between them.

    Args:
        device_placement: move models and batches to the device.
        split_batches: dataloaders cut each batch over the ranks instead of giving each rank whole batches.
        mixed_precision: ``bf16`` or ``fp16`` to compute in, with fp32 master values and gradients reduced in
            fp32 (unless the strategy names a ``reduce_dtype``); ``fp16`` scales losses dynamically. Models run under
            ``torch.autocast`` (unless the strategy says ``autocast=false``), so their inputs keep their dtypes. ``no``
            or ``None``: what the strategy's ``param_dtype`` says. The launcher's wins over this one.
        gradient_accumulation_steps: micro-batches per optimizer step, counted by :meth:`accumulate`.
        cpu: stay on the CPU (so does ``SHARDWISE_CPU=1``).
        dataloader_config: everything else about dataloaders.
        deepspeed_plugin, fsdp_plugin: translated into a strategy; Accelerate's own objects do as well.
        rng_types: random states to take from rank 0 at the beginning of every epoch, of ``torch``, ``cuda`` and
            ``generator``. Shuffled orders agree without it.
        log_with: names of trackers, ``"all"``, or tracker objects.
        project_dir, project_config: where checkpoints and logs go.
        gradient_accumulation_plugin: in place of ``gradient_accumulation_steps``.
        step_scheduler_with_optimizer: schedulers step when the optimizer did; otherwise whenever told.
        kwargs_handlers: settings for autocast, loss scaling, the process group, profiling, and of DDP's those
            that mean something here.
        parallelism_config: how many ranks repeat a model, and over how many it is split, in place of ``strategy``.
        dynamo_backend, dynamo_plugin: compile prepared models with ``torch.compile``, in place.
        strategy: a preset, its string form or a :class:`~shardwise.Strategy`; ``ddp`` by default, as in
            Accelerate when nothing is said. The launcher's (``SHARDWISE_STRATEGY``) wins over this one.
        even_batches: repeat samples so that every rank has equally many, equally large batches. Without it
            ranks may run out of batches at different times: see :meth:`join_uneven_inputs`.
        scheduler_per_process: advance schedulers once per rank at every optimizer step, as Accelerate does. By
            default the learning rate does not depend on the number of ranks, except where ``import accelerate`` means
            Shardwise (:func:`shardwise.install_as`): scripts for Accelerate multiply their schedules.
        profile_dir: a folder in which every rank writes down what it does until :meth:`end_training`, for
            ``shardwise report``; see :func:`shardwise.record`. The launcher's (``--record``) wins over this one.

    Two Accelerators share nothing but the process group.

    Raises:
        StrategyError: an unknown strategy or precision, two arguments that contradict each other, or something
            that is left out of this library.
        CommError: the ranks did not find each other.
        RecordError: ``profile_dir`` cannot be written to, or another record is under way.
    """

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool | None = None,
        mixed_precision: Any = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: Sequence[Any] | None = None,
        log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Sequence[KwargsHandler] | None = None,
        dynamo_backend: Any = None,
        dynamo_plugin: Any = None,
        deepspeed_plugins: Any = None,
        parallelism_config: Any = None,
        *,
        strategy: str | Strategy | None = None,
        even_batches: bool | None = None,
        scheduler_per_process: bool | None = None,
        profile_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        options.refuse_left_out(
            torch_tp_plugin=torch_tp_plugin,
            megatron_lm_plugin=megatron_lm_plugin,
        )
        handlers = options.Handlers.of(kwargs_handlers)
        plugin = deepspeed_plugin if deepspeed_plugin is not None else deepspeed_plugins
        arranged = own_parallelism(parallelism_config)
        chosen = options.choose_strategy(strategy, fsdp_plugin, plugin, mixed_precision, arranged)
        ddp: DistributedDataParallelKwargs | None = handlers.get(DistributedDataParallelKwargs)
        group: InitProcessGroupKwargs | None = handlers.get(InitProcessGroupKwargs)
        self.strategy = ddp.apply(chosen.strategy) if ddp is not None else chosen.strategy
        self.strategy = group.apply(self.strategy) if group is not None else self.strategy
        self.mixed_precision = self.strategy.param_dtype if self.strategy.param_dtype in HALVES else "no"
        self._units, self._param_init_fn = chosen.units, chosen.param_init_fn
        self._compile = options.choose_compile(dynamo_backend, dynamo_plugin)
        accumulation = options.choose_accumulation(
            gradient_accumulation_steps, gradient_accumulation_plugin, chosen.accumulation
        )
        self.dataloader_config = options.choose_dataloading(dataloader_config, split_batches, even_batches)
        self.project_configuration = options.choose_project(project_dir, project_config)
        self.device_placement = device_placement
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self._scheduler_per_process = self._as_accelerate if scheduler_per_process is None else scheduler_per_process
        self.autocast_handler = handlers.get(AutocastKwargs)
        self.profile_handler = handlers.get(ProfileKwargs)
        self.rng_types = [str(getattr(kind, "value", kind)) for kind in (rng_types or ["generator"])]

        self.device = torch.device("cpu") if cpu else default_device()
        init(self.device, timeout=self.strategy.timeout)
        if arranged is not None:
            arranged.to_strategy(World.current().size)
        self._recording = recording.of_door(profile_dir)

        scaling: GradScalerKwargs | None = handlers.get(GradScalerKwargs)
        self.scaler = None
        if self.mixed_precision == "fp16":
            settings = scaling.to_kwargs() if scaling is not None else chosen.scaling
            self.scaler = torch.amp.GradScaler(self.device.type, **settings)
        self._steps = Steps(
            accumulation.num_steps or 1, self.scaler, accumulation.sync_with_dataloader, accumulation.sync_each_batch
        )
        self._steps.max_norm = chosen.max_norm
        self._follow()
        self.step = 0
        self._schedulers, self._loaders, self._custom_objects = [], KnownLoaders(), []
        self._save_hooks, self._load_hooks = OrderedDict(), OrderedDict()
        self._steps.become_newest()
        self.gradient_state = GradientState(steps=self._steps)
        self.state = AcceleratorState.of(
            device=self.device,
            strategy=self.strategy,
            mixed_precision=self.mixed_precision,
            fsdp_plugin=fsdp_plugin,
            deepspeed_plugin=plugin,
            parallelism_config=arranged,
        )
        self.log_with = filter_trackers(log_with, self.logging_dir)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._follow()
        for loader in self._loaders:
            loader.watcher = self._steps

    # --- settings, as attributes ---------------------------------------------------------------
    @property
    def split_batches(self) -> bool:
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.dataloader_config.even_batches = value

    @property
    def use_seedable_sampler(self) -> bool:
        return self.dataloader_config.use_seedable_sampler

    @property
    def use_stateful_dataloader(self) -> bool:
        return self.dataloader_config.use_stateful_dataloader

    @property
    def non_blocking(self) -> bool:
        return self.dataloader_config.non_blocking

    @property
    def multi_device(self) -> bool:
        return self.use_distributed

    @property
    def native_amp(self) -> bool:
        return self.mixed_precision in HALVES

    @property
    def fsdp_plugin(self) -> Any:
        return self.state.fsdp_plugin

    @property
    def deepspeed_plugin(self) -> Any:
        return self.state.deepspeed_plugin

    @property
    def parallelism_config(self) -> ParallelismConfig | None:
        """What was given; ``None`` if nothing was."""
        return self.state.parallelism_config

    @property
    def torch_device_mesh(self) -> None:
        """Ranks are arranged by the strategy's own mesh."""
        return

    @property
    def is_fsdp2(self) -> bool:
        """Prepared models are no FSDP2 modules; they need no special treatment."""
        return False

    def __repr__(self) -> str:
        return (
            f"Accelerator(strategy='{self.strategy}', mixed_precision='{self.mixed_precision}', "
            f"device='{self.device}', num_processes={self.num_processes})"
        )
