"""The part of an Accelerator between two optimizer steps: accumulation, backward, clipping, precision, profiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise.accelerator.base import HALVES, Base
from shardwise.compat.dataclasses import AutocastKwargs, ProfileKwargs
from shardwise.compat.wrappers import extract_model_from_parallel
from shardwise.engine.build import no_sync
from shardwise.engine.clip import clip_grad_norm_, clip_grad_value_
from shardwise.engine.hooks import engine_of
from shardwise.errors import OptimizerError
from shardwise.joining import join_uneven_inputs
from shardwise.optimizer import AcceleratedOptimizer


class Training(Base):
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

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self._steps.sync_gradients = value

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

        Raises:
            GradientError: in the middle of a window, without a model that it has gradients of already. One Accelerator
                counts one window: ``accumulate(a)`` and then ``accumulate(b)`` are two micro-batches of it.
        """
        steps = self._steps
        models = tuple(extract_model_from_parallel(model, keep_torch_compile=False) for model in models)
        steps.begin_micro_batch(models)
        with ExitStack() as stack:
            if not steps.sync_gradients and not steps.sync_each_batch:
                for model in models or steps.models:
                    engine = engine_of(model)
                    if engine is not None and not engine.strategy.split_grads:
                        stack.enter_context(no_sync(model))
            yield

    def join_uneven_inputs(
        self, joinables: Sequence[Any], even_batches: bool | None = None
    ) -> AbstractContextManager[None]:
        """A block in which ranks may run out of data at different times, under every strategy.

        A rank whose prepared dataloader has ended stays in it, lends its shards to the others and steps its own
        pieces with them; no module runs on it. All ranks leave the loop together, with the same weights,
        optimizer state, schedules and (the last reader's) buffers. :meth:`gather` and :meth:`reduce` give the
        numbers of the ranks that have a batch.

        Args:
            joinables: prepared models and optimizers that are used inside; all prepared ones take part anyway.
            even_batches: inside the block, for all prepared map-style dataloaders, in place of their own setting.

        Gradients that :meth:`backward` computes are the mean over the micro-batches there are. A plain
        ``loss.backward()`` divides by the number of all ranks, as torch's ``Join`` does.

        Samples that the ranks have split themselves, in shares of unknown lengths, are read as they are here.

        A loop over something else than a prepared dataloader works if its body runs a model. A rank that leaves
        its loop with ``break`` has ended too, if it does so before it uses a batch.

        Raises:
            UnitError: something in ``joinables`` was not prepared.
            CommError: a collective in the loop that ranks without data cannot take part in, for example a save.

        Cost: an all-gather of 16 bytes per batch; once a rank has ended, a small message per gather, reduce
        and step. Nothing on one rank.
        """
        return join_uneven_inputs(self._steps, joinables, self._dataloaders, even_batches)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Backwards inside keep their gradients on this rank, whole; the first one outside reduces their sum."""
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        return no_sync(model) if engine_of(model) is not None else nullcontext()

    @staticmethod
    @contextmanager
    def trigger_sync_in_backward(model: nn.Module) -> Iterator[None]:
        """Backwards inside reduce their gradients, also within :meth:`no_sync`."""
        engine = engine_of(extract_model_from_parallel(model, keep_torch_compile=False))
        if engine is None:
            yield
            return
        before, engine.sync = engine.sync, True
        try:
            yield
        finally:
            engine.sync = before

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
        if self._recording is not None:
            self._recording.tell(loss=loss)
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

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Take fp16's loss scale out of the gradients, once per step; clipping does it by itself.

        Args:
            optimizer: one prepared optimizer or a list of them; all by default.

        Nothing is scaled in other precisions, and nothing final before a window's boundary.
        """
        if self.scaler is None or not self._steps.sync_gradients:
            return
        wanted = self._steps.optimizers if optimizer is None else optimizer
        for one in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
            prepared = one if isinstance(one, AcceleratedOptimizer) else self._wrapper_of(one)
            prepared.unscale()

    def _wrapper_of(self, optimizer: Any) -> AcceleratedOptimizer:
        for known in self._steps.optimizers:
            if known.optimizer is optimizer:
                return known
        raise OptimizerError(
            f"{type(optimizer).__name__} was not prepared by this Accelerator", fix="accelerator.prepare(optimizer)"
        )

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """torch's autocast in the mixed precision, for code outside prepared models (those compute in it anyway).

        Args:
            autocast_handler: in place of the one in ``kwargs_handlers``; ``enabled=False`` keeps fp32 inside.
        """
        handler = autocast_handler or self.autocast_handler or AutocastKwargs()
        dtype = HALVES.get(self.mixed_precision)
        if dtype is None:
            return nullcontext()
        return torch.autocast(
            self.device.type, dtype, enabled=handler.enabled, cache_enabled=bool(handler.cache_enabled)
        )

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[Any]:
        """Run the block under ``torch.profiler``; yields the profiler.

        Args:
            profile_handler: in place of the one in ``kwargs_handlers``. With its ``output_trace_dir``, every rank
                writes ``profile_<rank>.json`` there, for Perfetto or ``chrome://tracing``; then it is a collective.
        """
        handler = profile_handler or self.profile_handler or ProfileKwargs()
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is not None:
            folder = Path(handler.output_trace_dir)
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"profile_{self.process_index}.json"))
            self.wait_for_everyone()


def _as_list(parameters: Any) -> list[Any]:
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
