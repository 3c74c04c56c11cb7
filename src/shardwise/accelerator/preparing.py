"""The part of an Accelerator that takes models, optimizers, dataloaders and schedulers in, and lets go of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from shardwise.accelerator.base import HALVES, Base
from shardwise.accelerator.options import autocast_by_default
from shardwise.compat.deepspeed import DummyOptim, DummyScheduler
from shardwise.compat.memory import release_memory
from shardwise.compat.wrappers import extract_model_from_parallel
from shardwise.data_loader import PreparedLoader, prepare_data_loader, skip_first_batches
from shardwise.device import HALF_PRECISION
from shardwise.engine.build import shard
from shardwise.engine.deferred import Deferred
from shardwise.engine.elementwise import check, needs_whole_tensors
from shardwise.engine.engine import Engine
from shardwise.engine.hooks import engine_of
from shardwise.engine.mixed_precision import compute_in
from shardwise.engine.move import move
from shardwise.engine.optimizer import attach
from shardwise.errors import DataError, OptimizerError, UnitError
from shardwise.observe import recording
from shardwise.optimizer import AcceleratedOptimizer
from shardwise.scheduler import AcceleratedScheduler
from shardwise.strategy import Strategy
from shardwise.trees import map_tensors


class Preparing(Base):
    def prepare(
        self,
        *args: Any,
        device_placement: Sequence[bool | None] | None = None,
        strategy: str | Strategy | None = None,
    ) -> Any:
        """Make models, optimizers, dataloaders and schedulers ready for all ranks.

        Models are sharded in place and come back as the same objects; the others come back wrapped. Anything
        else passes through. Optimizers may have been built before or after; those that need whole tensors (Muon,
        Adafactor, classes we do not know) get them if they are prepared together with their model.

        Args:
            args: in any order.
            device_placement: for each object, whether to move it; by default the Accelerator's setting.
            strategy: for the models of this call, in place of the Accelerator's. Models may also be sharded
                before, with :func:`shardwise.fully_shard`; they are taken as they are.

        Returns:
            The prepared objects in the same order; a single one alone.

        Raises:
            OptimizerError: an optimizer cannot train a sharded model (LBFGS, SparseAdam), or its model was
                sharded earlier in a layout it cannot use.
            UnitError: see :func:`shardwise.fully_shard`; a model spread by ``device_map`` over several devices; or
                ``strategy`` for one that is sharded under another.
            DataError: see ``split_batches``.

        Cost: sends each model's parameters once. A collective.
        """
        places = list(device_placement) if device_placement is not None else [None] * len(args)
        if len(places) != len(args):
            raise DataError(
                f"device_placement has {len(places)} entries for {len(args)} objects", fix="give one per object"
            )
        if any(isinstance(item, (DummyOptim, DummyScheduler)) for item in args):
            raise OptimizerError(
                "DummyOptim and DummyScheduler stand for what a DeepSpeed configuration describes, and build nothing",
                where="Accelerator.prepare",
                fix="build torch's optimizer and scheduler in the script, or use shardwise.deepspeed.initialize",
            )
        optimizers = [_inner(o) for o in args if isinstance(o, Optimizer)]
        done: dict[int, Any] = {}
        loaders = [item for item in args if isinstance(item, DataLoader)]
        for item, place in zip(args, places, strict=True):
            if isinstance(item, nn.Module):
                done[id(item)] = self._prepare_model(item, place, optimizers, strategy, loaders)
        for item, place in zip(args, places, strict=True):
            if isinstance(item, Optimizer):
                done[id(item)] = self.prepare_optimizer(item, device_placement=place)
        for item, place in zip(args, places, strict=True):
            if isinstance(item, DataLoader):
                done[id(item)] = self.prepare_data_loader(item, device_placement=place)
            elif isinstance(item, (LRScheduler, AcceleratedScheduler)):
                done[id(item)] = self.prepare_scheduler(item)
        result = tuple(done.get(id(item), item) for item in args)
        return result[0] if len(result) == 1 else result

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
        *,
        strategy: str | Strategy | None = None,
    ) -> nn.Module:
        """Move a model to the device and shard it in place. Models sharded already are taken as they are.

        Args:
            model: any module.
            device_placement: whether to move it; by default the Accelerator's setting.
            evaluation_mode: the model will not be trained. Under ``ddp``, ``zero1`` and ``zero2``, which keep
                parameters whole, it is then only moved: every rank computes with its own values.
            strategy: in place of the Accelerator's.

        Raises:
            UnitError: see :meth:`prepare`.
        """
        chosen = self.strategy if strategy is None else self._in_precision(Strategy.parse(strategy))
        if evaluation_mode and engine_of(model) is None and (chosen.is_auto or not chosen.split_params):
            self._check_device_map(model)
            if self.device_placement if device_placement is None else device_placement:
                move(model, self.device)
            Deferred(model, self.device, self._param_init_fn).materialise_all()
            if chosen.param_dtype in HALVES:
                compute_in(model, chosen)
                _give_fp32(model)
            return model
        return self._prepare_model(model, device_placement, [], strategy)

    def _prepare_model(
        self,
        model: nn.Module,
        placement: bool | None,
        optimizers: Sequence[Optimizer],
        strategy: str | Strategy | None,
        loaders: Sequence[DataLoader[Any]] = (),
    ) -> nn.Module:
        engine = engine_of(model)
        if engine is not None and strategy is not None:
            self._check_strategy(model, engine, Strategy.parse(strategy))
        if any(model is known for known in self._steps.models):
            return model
        if engine is None:
            self._check_device_map(model)
            own = {id(p) for p in model.parameters()}
            holding = [o for o in optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]
            for optimizer in holding:
                check(optimizer, [])  # before anything is changed: will it ever work?
            if self.device_placement if placement is None else placement:
                move(model, self.device)
            chosen = self.strategy if strategy is None else self._in_precision(Strategy.parse(strategy))
            if chosen.is_auto:
                from shardwise.plan import auto, given  # which take a while to import

                example = next((b for loader in loaders if (b := given.batch_of(loader)) is not None), None)
                chosen = auto.choose(model, chosen, self.device, example, holding)
            if any(needs_whole_tensors(o) for o in holding):
                chosen = chosen.replace(layout="tensor")
            if own:
                shard(model, chosen, units=self._units, param_init_fn=self._param_init_fn)
                engine = engine_of(model)
        if engine is not None:
            recording.from_environment(model)
        self._steps.models.append(model)
        self._watch_state_dict(model)
        if engine is not None and engine.strategy.param_dtype in HALVES:
            _give_fp32(model)
        if self._compile is not None and model._compiled_call_impl is None:
            model.compile(**self._compile)  # in place, so the module stays the caller's own
        return model

    def _in_precision(self, strategy: Strategy) -> Strategy:
        """A model's own strategy computes in the Accelerator's precision unless it names another."""
        if strategy.param_dtype is None and self.mixed_precision in HALVES:
            strategy = strategy.in_precision(self.mixed_precision)
        return autocast_by_default(strategy)

    def _check_strategy(self, model: nn.Module, engine: Engine, asked: Strategy) -> None:
        """A model that is sharded already stays as it is: another strategy for it is a mistake."""
        found = engine.strategy.replace(layout=asked.layout)  # its optimizer may have needed another
        if found not in (asked, self._in_precision(asked)):
            raise UnitError(
                f"it is sharded under '{engine.strategy}' already, and this call asks for '{asked}'",
                where=type(model).__name__,
                fix="leave strategy= out for a model that is prepared or sharded; to change it, save, and load into a "
                "new model that is prepared under the other one",
            )

    def _check_device_map(self, model: nn.Module) -> None:
        if self.verify_device_map(model):
            raise UnitError(
                f"{type(model).__name__} is spread over several devices by a device_map",
                fix="load it without device_map; the strategy decides where its parameters are",
            )

    def verify_device_map(self, model: nn.Module) -> bool:
        """A ``device_map`` has spread the model, or a module in it, over several devices."""
        return any(len(getattr(m, "hf_device_map", None) or ()) > 1 for m in model.modules())

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """Wrap an optimizer; its model, if prepared separately, must have been prepared before.

        Raises:
            OptimizerError: see :meth:`prepare`.
        """
        inner = _inner(optimizer)
        for known in self._steps.optimizers:
            if known.optimizer is inner:
                return known
        place = self.device_placement if device_placement is None else device_placement
        wrapped = AcceleratedOptimizer(inner, place, steps=self._steps)
        attach(inner)
        self._steps.optimizers.append(wrapped)
        return wrapped

    def prepare_data_loader(
        self, data_loader: DataLoader[Any], device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> PreparedLoader:
        """This rank's batches, on its device: see :func:`shardwise.data_loader.prepare_data_loader`.

        A collective if it shuffles. Cost per batch: none where ranks read for themselves (map-style datasets);
        one message per rank where rank 0 reads for all (iterable datasets, and ``dispatch_batches=True``).

        Raises:
            DataError: ``split_batches`` with a batch size that the ranks do not divide.
        """
        if isinstance(data_loader, PreparedLoader):
            data_loader.watcher = data_loader.watcher or self._steps
            self._loaders.add(data_loader)
            return data_loader
        config = self.dataloader_config
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=self.num_processes,
            process_index=self.process_index,
            split_batches=config.split_batches,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=self.rng_types,
            dispatch_batches=config.dispatch_batches,
            even_batches=config.even_batches,
            slice_fn_for_dispatch=slice_fn_for_dispatch,
            use_seedable_sampler=config.use_seedable_sampler,
            data_seed=config.data_seed,
            non_blocking=config.non_blocking,
            use_stateful_dataloader=config.use_stateful_dataloader,
            watcher=self._steps,
        )
        if isinstance(prepared, PreparedLoader):  # a view of one by skip_first_batches stays what it is
            self._loaders.add(prepared)
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Tie a scheduler to its optimizer's steps; the optimizer must have been prepared before."""
        inner = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
        for known in self._schedulers:
            if known.scheduler is inner:
                return known
        raw = _inner(getattr(inner, "optimizer", None))
        followed = [o for o in self._steps.optimizers if raw is None or o.optimizer is raw]
        times = self.num_processes if self._scheduler_per_process and not self.dataloader_config.split_batches else 1
        wrapped = AcceleratedScheduler(
            inner, followed, self.step_scheduler_with_optimizer, steps=self._steps, times=times
        )
        self._schedulers.append(wrapped)
        return wrapped

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """A view of a dataloader whose next epoch begins after ``num_batches`` batches, in the same order.

        The batches are passed over without being read where the dataset is map-style. See ``docs/data.md``.
        """
        return skip_first_batches(dataloader, num_batches)

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """The caller's own module: prepared models are that already; wrappers around them are taken off.

        Args:
            model: prepared, or wrapped in DDP, FSDP or ``torch.compile``.
            keep_fp32_wrapper: has no effect here: outputs come in fp32 through a hook that stays.
            keep_torch_compile: leave ``torch.compile``'s wrapper on.
        """
        return extract_model_from_parallel(model, keep_fp32_wrapper, keep_torch_compile)

    def free_memory(self, *objects: Any) -> list[Any]:
        """Forget every prepared object and the accumulation window, and free what nobody else refers to.

        Returns:
            As many ``None`` as ``objects``, to overwrite the caller's own names with:
            ``model, optimizer = accelerator.free_memory(model, optimizer)``.
        """
        steps = self._steps
        steps.models.clear()
        steps.optimizers.clear()
        steps.loaders.clear()
        steps.schedulers.clear()
        self._schedulers.clear()
        self._loaders.clear()
        steps.restart()
        self.step = 0
        return release_memory(*objects)

    def clear(self, *objects: Any) -> list[Any]:
        """Another name of :meth:`free_memory`."""
        return self.free_memory(*objects)


def _inner(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _give_fp32(model: nn.Module) -> None:
    """Once, however often it is prepared."""
    if _outputs_in_fp32 not in model._forward_hooks.values():
        model.register_forward_hook(_outputs_in_fp32)


def _outputs_in_fp32(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: losses are computed in fp32 whatever the model computed in."""
    return map_tensors(output, lambda t: t.float() if t.dtype in HALF_PRECISION else t)
