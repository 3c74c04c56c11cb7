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
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from shardwise import operations
from shardwise.comm import World, init
from shardwise.comm.world import default_device
from shardwise.data import ShardedLoader
from shardwise.engine.build import engine_of, no_sync, shard
from shardwise.engine.clip import clip_grad_norm_, clip_grad_value_
from shardwise.engine.optimizer import attach, check, needs_whole_tensors
from shardwise.environment import CPU, mixed_precision_from_environment, strategy_from_environment
from shardwise.errors import StrategyError
from shardwise.fsdp import DistributedDataParallel, FullyShardedDataParallel
from shardwise.stepping import AcceleratedOptimizer, AcceleratedScheduler, Steps
from shardwise.strategy import Strategy
from shardwise.trees import leaves, map_tensors

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Accelerator:
    """Prepares models, optimizers, dataloaders and schedulers, and runs the steps between them.

    Args:
        mixed_precision: ``bf16`` or ``fp16`` to compute in, with fp32 master values and gradients reduced in
            fp32 (unless the strategy names a ``reduce_dtype``); ``fp16`` scales losses dynamically. ``no`` or
            ``None``: what the strategy's ``param_dtype`` says. The launcher's wins over this one.
        gradient_accumulation_steps: micro-batches per optimizer step, counted by :meth:`accumulate`.
        strategy: a preset, its string form or a :class:`~shardwise.Strategy`; ``ddp`` by default, as in
            Accelerate when nothing is said. The launcher's (``SHARDWISE_STRATEGY``) wins over this one.
        cpu: stay on the CPU (so does ``SHARDWISE_CPU=1``).
        split_batches: dataloaders cut each batch over the ranks instead of giving each rank whole batches.
        even_batches: repeat samples so that every rank has equally many, equally large batches. Without it
            ranks may run out of batches at different times, and the others wait for them in vain.
        step_scheduler_with_optimizer: schedulers step when the optimizer did; otherwise whenever told.
        device_placement: move models and batches to the device.

    Two Accelerators share nothing but the process group.

    Raises:
        StrategyError: an unknown strategy or precision, or two that contradict each other.
        CommError: the ranks did not find each other.
    """

    def __init__(
        self,
        *,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        strategy: str | Strategy | None = None,
        cpu: bool = False,
        split_batches: bool = False,
        even_batches: bool = True,
        step_scheduler_with_optimizer: bool = True,
        device_placement: bool = True,
    ) -> None:
        chosen = strategy_from_environment("ddp" if strategy is None else strategy)
        precision = mixed_precision_from_environment(mixed_precision)
        if precision in _HALVES:
            if chosen.param_dtype not in (None, precision):
                raise StrategyError(
                    f"mixed_precision='{precision}' and param_dtype={chosen.param_dtype} contradict each other",
                    where=f"strategy '{chosen}'",
                    fix="say it once",
                )
            chosen = chosen.replace(param_dtype=precision)
        self.strategy = chosen
        self.mixed_precision = chosen.param_dtype if chosen.param_dtype in _HALVES else "no"
        self.split_batches, self.even_batches = split_batches, even_batches
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.device_placement = device_placement
        self.device = torch.device("cpu") if cpu or os.environ.get(CPU) == "1" else default_device()
        self._world: World = init(self.device, timeout=chosen.timeout)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.mixed_precision == "fp16" else None
        if gradient_accumulation_steps < 1:
            raise StrategyError(
                f"gradient_accumulation_steps={gradient_accumulation_steps} is not a number of batches",
                fix="give 1 or more",
            )
        self._steps = Steps(gradient_accumulation_steps, self.scaler)
        self._schedulers: list[AcceleratedScheduler] = []

    # --- who this is -----------------------------------------------------------------------
    @property
    def num_processes(self) -> int:
        return self._world.size

    @property
    def process_index(self) -> int:
        return self._world.rank

    @property
    def local_process_index(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0")) if self._world.size > 1 else 0

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        return self.local_process_index == 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print``, once per host."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def wait_for_everyone(self) -> None:
        """Return when every rank is here. A collective."""
        operations.barrier()

    # --- preparing -------------------------------------------------------------------------
    def prepare(self, *objects: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """Make models, optimizers, dataloaders and schedulers ready for all ranks.

        Models are sharded in place and come back as the same objects; the others come back wrapped. Anything
        else passes through. Optimizers may have been built before or after; those that need whole tensors (Muon,
        Adafactor, classes we do not know) get them if they are prepared together with their model.

        Args:
            objects: in any order.
            device_placement: for each object, whether to move it; by default the Accelerator's setting.

        Returns:
            The prepared objects in the same order; a single one alone.

        Raises:
            OptimizerError: an optimizer cannot train a sharded model (LBFGS, SparseAdam), or its model was
                sharded earlier in a layout it cannot use.
            UnitError: see :func:`shardwise.fully_shard`.
            DataError: see ``split_batches``.

        Cost: sends each model's parameters once. A collective.
        """
        places = list(device_placement) if device_placement is not None else [None] * len(objects)
        if len(places) != len(objects):
            raise ValueError(f"device_placement has {len(places)} entries for {len(objects)} objects")
        optimizers = [_inner(o) for o in objects if isinstance(o, Optimizer)]
        done: dict[int, Any] = {}
        for item, place in zip(objects, places, strict=True):
            if isinstance(item, nn.Module):
                done[id(item)] = self._prepare_model(item, place, optimizers)
        for item in objects:
            if isinstance(item, Optimizer):
                done[id(item)] = self.prepare_optimizer(item)
        for item, place in zip(objects, places, strict=True):
            if isinstance(item, DataLoader):
                done[id(item)] = self.prepare_data_loader(item, device_placement=place)
            elif isinstance(item, (LRScheduler, AcceleratedScheduler)):
                done[id(item)] = self.prepare_scheduler(item)
        result = tuple(done.get(id(item), item) for item in objects)
        return result[0] if len(result) == 1 else result

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None) -> nn.Module:
        """Move a model to the device and shard it in place. Models sharded already are taken as they are."""
        return self._prepare_model(model, device_placement, [])

    def _prepare_model(self, model: nn.Module, placement: bool | None, optimizers: Sequence[Optimizer]) -> nn.Module:
        if any(model is known for known in self._steps.models):
            return model
        engine = engine_of(model)
        if engine is None:
            own = {id(p) for p in model.parameters()}
            holding = [o for o in optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]
            for optimizer in holding:
                check(optimizer, [])  # before anything is changed: will it ever work?
            if self.device_placement if placement is None else placement:
                model.to(self.device)
            strategy = self.strategy
            if any(needs_whole_tensors(o) for o in holding):
                strategy = strategy.replace(layout="tensor")
            if own:
                shard(model, strategy)
                engine = engine_of(model)
        self._steps.models.append(model)
        if engine is not None and engine.strategy.param_dtype in _HALVES:
            model.register_forward_hook(_outputs_in_fp32)
        return model

    def prepare_optimizer(self, optimizer: Optimizer) -> AcceleratedOptimizer:
        """Wrap an optimizer; its model, if prepared separately, must have been prepared before.

        Raises:
            OptimizerError: see :meth:`prepare`.
        """
        inner = _inner(optimizer)
        for known in self._steps.optimizers:
            if known.optimizer is inner:
                return known
        if self.device_placement:
            _state_to_parameters(inner)
        attach(inner)
        wrapped = AcceleratedOptimizer(inner, self._steps)
        self._steps.optimizers.append(wrapped)
        return wrapped

    def prepare_data_loader(self, loader: DataLoader[Any], device_placement: bool | None = None) -> ShardedLoader:
        """A loader of this rank's batches. See :class:`~shardwise.data.ShardedLoader`. A collective if it shuffles."""
        if isinstance(loader, ShardedLoader):
            return loader
        place = self.device_placement if device_placement is None else device_placement
        return ShardedLoader(
            loader,
            device=self.device if place else None,
            ranks=self.num_processes,
            rank=self.process_index,
            watcher=self._steps,
            split_batches=self.split_batches,
            even_batches=self.even_batches,
        )

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Tie a scheduler to its optimizer's steps; the optimizer must have been prepared before."""
        inner = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
        for known in self._schedulers:
            if known.scheduler is inner:
                return known
        raw = _inner(getattr(inner, "optimizer", None))
        followed = [o for o in self._steps.optimizers if raw is None or o.optimizer is raw]
        wrapped = AcceleratedScheduler(inner, followed, self._steps, self.step_scheduler_with_optimizer)
        self._schedulers.append(wrapped)
        return wrapped

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The caller's own module: prepared models are that already; wrappers around them are taken off."""
        while True:
            if isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)):
                model = model.module
            elif isinstance(inner := vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):
                model = inner  # torch.compile's
            else:
                return model

    # --- steps -----------------------------------------------------------------------------
    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step. May be changed between windows."""
        return self._steps.length

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int) -> None:
        self._steps.length = steps

    @property
    def sync_gradients(self) -> bool:
        """This micro-batch is the last before an optimizer step (always, if :meth:`accumulate` is not used)."""
        return self._steps.sync_gradients

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """An optimizer's last step was skipped on all ranks because gradients overflowed fp16 on one."""
        return any(o.step_was_skipped for o in self._steps.optimizers)

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """One micro-batch: forward, :meth:`backward`, and the steps, which only act at the window's boundary.

        A window has ``gradient_accumulation_steps`` micro-batches, fewer at the end of a prepared dataloader.
        Its gradients end as the mean over the micro-batches it has.

        Args:
            models: those trained here; all prepared ones by default. Before the boundary, gradients that are
                whole on every rank (ddp, zero1) wait and are sent once; split ones (zero2, zero3, hsdp) are
                reduced each time, which keeps them split.
        """
        steps = self._steps
        steps.begin_micro_batch()
        with ExitStack() as stack:
            if not steps.sync_gradients:
                for model in models or steps.models:
                    engine = engine_of(model)
                    if engine is not None and not engine.strategy.split_grads:
                        stack.enter_context(no_sync(model))
            yield

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Backwards inside keep their gradients on this rank, whole; the first one outside reduces their sum."""
        return no_sync(model) if engine_of(model) is not None else nullcontext()

    def backward(self, loss: torch.Tensor, weight: float | torch.Tensor | None = None, **kwargs: Any) -> None:
        """Compute gradients; at a window's boundary they become the mean over all ranks and micro-batches.

        Args:
            loss: of this rank and micro-batch, not divided by anything.
            weight: how many items (tokens, say) ``loss`` is the mean of. The step's gradient is then the mean over
                all items: the sum of ``weight * grad(loss)`` over ranks and micro-batches, divided by the sum
                of the weights, however unevenly they are spread. 0 is fine: such a loss counts for nothing,
                whatever its value.
            kwargs: for ``loss.backward``, for example ``retain_graph=True``.

        Several losses in one micro-batch add up; each weighted one counts its own items.
        Outside :meth:`accumulate` every backward is on its own: the loss is divided by
        ``gradient_accumulation_steps``, as Accelerate does, or weighted among the ranks.

        Raises:
            GradientError: weighted and unweighted losses in one window; a negative weight.

        Cost: weights take an all-gather of 8 bytes per boundary; a weight on a GPU is waited for.
        """
        self._steps.backward(loss, None if weight is None else float(weight), **kwargs)

    def clip_grad_norm_(
        self, parameters: nn.Module | torch.Tensor | Iterable[Any], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor | None:
        """Clip by the global norm over all ranks. See :func:`shardwise.clip_grad_norm_`.

        Returns:
            The norm before, without fp16's loss scale, equal on every rank; ``None``, and nothing is done,
            before the window's boundary.
        """
        params = _as_list(parameters)
        return clip_grad_norm_(params, max_norm, norm_type) if self._final(params) else None

    def clip_grad_value_(self, parameters: nn.Module | torch.Tensor | Iterable[Any], clip_value: float) -> None:
        """Clamp every gradient element to ``[-clip_value, clip_value]``, at the window's boundary only."""
        params = _as_list(parameters)
        if self._final(params):
            clip_grad_value_(params, clip_value)

    def _final(self, params: Sequence[nn.Parameter]) -> bool:
        """Make the gradients what the optimizer will see, if this is a boundary."""
        if not self._steps.sync_gradients:
            return False
        self._steps.settle()
        if self.scaler is not None:
            self._steps.unscale(params)
        return True

    def autocast(self) -> AbstractContextManager[Any]:
        """torch's autocast in the mixed precision, for code outside prepared models (those compute in it anyway)."""
        dtype = _HALVES.get(self.mixed_precision or "no")
        return torch.autocast(self.device.type, dtype) if dtype is not None else nullcontext()

    # --- numbers from all ranks --------------------------------------------------------------
    def gather(self, tensor: Any) -> Any:
        """Nested tensors of all ranks, concatenated along dim 0. See :func:`shardwise.operations.gather`."""
        return operations.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """:meth:`gather`, without the samples that the last batch of a prepared dataloader repeats.

        Exact for map-style datasets, and for iterable ones read without worker processes.

        Args:
            input_data: nested tensors with one row (or equally many rows) per sample; or any picklable
                objects, lists of which are joined.
            use_gather_object: pickle even tensors, for example because the ranks have different shapes.
        """
        tensors = all(isinstance(leaf, torch.Tensor) for leaf in leaves(input_data))
        loader = self._steps.loader
        tail = loader.tail() if loader is not None else None

        def real(rows: Any) -> Any:
            n = len(rows)
            whole = tail is not None and tail.total and n >= tail.total and n % tail.total == 0
            return rows[: tail.real * (n // tail.total)] if tail is not None and whole else rows

        if tensors and not use_gather_object:
            return map_tensors(operations.gather(input_data), real)
        parts = operations.gather_object(input_data)
        lists = all(isinstance(part, (list, tuple)) for part in parts)
        return real([item for part in parts for item in part] if lists else parts)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Nested tensors, summed (``sum``) or averaged (``mean``) over the ranks, times ``scale``."""
        return operations.reduce(tensor, reduction, scale)


def _inner(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _as_list(parameters: Any) -> list[Any]:
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _outputs_in_fp32(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: losses are computed in fp32 whatever the model computed in."""
    half = (torch.float16, torch.bfloat16)
    return map_tensors(output, lambda t: t.float() if t.dtype in half else t)


def _state_to_parameters(optimizer: Optimizer) -> None:
    """Momenta of a resumed run follow their parameters to the device (0-dim counters stay where they are)."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim > 0:
                    state[key] = value.to(p.device)
