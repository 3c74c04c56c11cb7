"""The part of an engine that trains: forward, backward, step, and what belongs to a window of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from shardwise.deepspeed.engine_facts import Answers
from shardwise.deepspeed.plain_backward import scaled_backward, watch
from shardwise.device import HALF_PRECISION
from shardwise.engine.build import require_engine
from shardwise.errors import GradientError, OptimizerError


class Stepping(Answers):
    _override: bool | None = None  # what set_gradient_accumulation_boundary said
    _inside_no_sync = False
    _expected = 0  # losses that scale() has made, whose backward has not come
    _backwards = 0  # since the last step
    _destroyed = False

    # --- forward -------------------------------------------------------------------------------
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model."""
        if self.reports.idle:
            return self.module(*inputs, **kwargs)
        self.reports.forward_begins(self.global_steps)
        output = self.module(*inputs, **kwargs)
        self.reports.forward_ends()
        return output

    def _before_forward(self) -> None:
        """Called by a hook on the model, which scripts may also call as ``engine.module``."""
        if torch.is_grad_enabled():
            self._steps.more_comes()

    def _after_forward(self, output: Any) -> None:
        if torch.is_grad_enabled() and (self._steps.in_advance or self._steps.length > 1):
            watch(output, self._plain_backward, self._steps.after_plain_backward)

    def train(self, mode: bool = True) -> Any:
        self.module.train(mode)
        self.training = mode
        return self

    def eval(self) -> Any:
        return self.train(False)

    # --- backward ------------------------------------------------------------------------------
    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Compute gradients. At a window's end they become the mean over its micro-batches and all ranks.

        Several losses of one micro-batch add up. ``loss.backward()`` does the same, but for fp16, where losses are
        scaled: there it is ``engine.scale(loss).backward()``.

        Args:
            loss: a number, of this rank and micro-batch, divided by nothing.
            retain_graph: for another backward through the same graph.
            scale_wrt_gas: divide by :meth:`gradient_accumulation_steps`.

        Returns:
            The loss, divided like that, in its own dtype.

        Raises:
            GradientError: it is no number that has a gradient.
            OptimizerError: the engine has no optimizer.
        """
        self._need_optimizer("backward")
        _check_loss(loss)
        length = self._steps.length
        wide = loss.float() if loss.dtype in HALF_PRECISION else loss
        counted = wide if scale_wrt_gas or length == 1 else wide * length
        with scaled_backward(), self.reports.part("backward"):
            self._steps.backward(counted, retain_graph=retain_graph or None)
        self._backwards += 1
        part = wide / length if scale_wrt_gas and length > 1 else wide
        self.reports.loss(part)
        return part.to(loss.dtype)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss to call ``backward()`` on: scaled in fp16, and as it is in other precisions.

        Raises:
            GradientError, OptimizerError: see :meth:`backward`.
        """
        self._need_optimizer("scale")
        _check_loss(loss)
        self._expected += 1
        return self._steps.scaled(loss.float() if loss.dtype in HALF_PRECISION else loss)

    def _plain_backward(self) -> None:
        """A backward that no engine runs has reached the model's output."""
        self._steps.more_comes()
        if not self._steps.in_advance:
            return
        if not self._expected:
            raise GradientError(
                "loss.backward() in fp16: the loss is not scaled, and its gradients would vanish",
                where=type(self.module).__name__,
                fix="engine.backward(loss), or engine.scale(loss).backward()",
            )
        self._expected -= 1

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside keep their gradients on this rank, under every stage; the first one outside sends their sum.

        Costs a whole gradient of memory on each rank.

        Raises:
            GradientError: inside of another one.
        """
        if self._inside_no_sync:
            raise GradientError("no_sync inside of no_sync", fix="leave one out")
        self._inside_no_sync = True
        self._send_or_not()
        try:
            yield
        finally:
            self._inside_no_sync = False
            self._send_or_not()

    # --- windows -------------------------------------------------------------------------------
    def is_gradient_accumulation_boundary(self) -> bool:
        """This micro-batch is the last of its window: the next :meth:`step` acts.

        With ``managed_gradient_accumulation: false`` that is so only while :meth:`step` runs.
        """
        if self._override is not None:
            return self._override
        if not self.managed_gradient_accumulation():
            return self._in_step
        return (self.micro_steps + 1) % self._steps.length == 0

    _in_step = False

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From here on the script says whether a micro-batch is the last of its window: before its forward.

        Gradients are divided by :meth:`gradient_accumulation_steps` however many there are.

        Raises:
            OptimizerError: with ``managed_gradient_accumulation: false``.
        """
        if not self.managed_gradient_accumulation():
            raise OptimizerError(
                "set_gradient_accumulation_boundary with managed_gradient_accumulation: false, where every step() is "
                "the end of a window",
                fix="leave out one of them",
            )
        self._override = bool(is_boundary)
        self._steps.sync_gradients = self._override
        self._send_or_not()

    def _begin_micro_batch(self) -> None:
        self._steps.next_micro_batch(self.is_gradient_accumulation_boundary())
        self._send_or_not()

    def _send_or_not(self) -> None:
        """Whole gradients wait on this rank for the end of their window; split ones are reduced each time."""
        if self.optimizer is None or not any(True for _ in self.module.parameters()):
            return
        engine = require_engine(self.module)
        ends = self._steps.sync_gradients or not self.managed_gradient_accumulation()
        engine.sync = not self._inside_no_sync and (ends or engine.strategy.split_grads)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also those that are being accumulated: the window begins anew."""
        for p in self.module.parameters():
            p.grad = None
        if self.optimizer is not None:
            self._steps.restart()
            self._begin_micro_batch()

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """After every micro-batch. At a window's end: clip, update, step the scheduler, drop the gradients.

        Nothing is updated, and the scheduler stays, where gradients are not finite in fp16 (or bf16, by
        ``check_grad_overflow``): ``skipped_steps`` counts it.

        Args:
            lr_kwargs: for the scheduler's ``step``.

        Raises:
            GradientError: inside of ``no_sync``, or gradients are on this rank only, because its end came later than
                the last backward.
            OptimizerError: the engine has no optimizer.
        """
        self._need_optimizer("step")
        if self._inside_no_sync:
            raise GradientError("engine.step() inside of no_sync", fix="call it behind the block")
        self._step_applied = False
        self._in_step = True
        try:
            boundary = self.is_gradient_accumulation_boundary()
            self._steps.sync_gradients = boundary
            if boundary:
                with self.reports.part("step"):
                    self._update(lr_kwargs)
        finally:
            self._in_step = False
        if boundary:
            self._tell()
        self.micro_steps += 1
        self._begin_micro_batch()

    def _update(self, lr_kwargs: Mapping[str, Any] | None) -> None:
        assert self.optimizer is not None
        if isinstance(self.lr_scheduler, ReduceLROnPlateau) and "metrics" not in (lr_kwargs or {}):
            raise OptimizerError(
                "ReduceLROnPlateau needs a value in each step",
                where="engine.step",
                fix="engine.step(lr_kwargs={'metrics': loss}), the same number on all ranks",
            )
        if self.facts.needs_all_gradients:
            self._need_all_gradients()
        self.optimizer.step()
        self._steps.drop_gradients()
        skipped = self.optimizer.step_was_skipped
        self._step_applied = not skipped
        self.skipped_steps += skipped
        if self._scheduler is not None:
            self._scheduler.step(**(lr_kwargs or {}))
        self.global_steps += 1
        windows = 1.0 if self.managed_gradient_accumulation() else self._backwards / self._steps.length
        self.global_samples += round(self._train_batch * windows)
        self._backwards = self._expected = 0

    def _need_all_gradients(self) -> None:
        """What reduces leave shows the same gradients on every rank."""
        for name, p in self.module.named_parameters():
            if p.requires_grad and p.grad is None and p.numel():
                raise GradientError(
                    "no backward of this window gave it a gradient, and ignore_unused_parameters is false",
                    where=f"parameter '{name}'",
                    fix="use it in every window, or set zero_optimization.ignore_unused_parameters to true",
                )

    def _tell(self) -> None:
        every = self.steps_per_print()
        if every and self.global_rank == 0 and self.global_steps % every == 0:
            self._say(
                f"step={self.global_steps}, skipped={self.skipped_steps}, lr={self.get_lr()}, mom={self.get_mom()}"
            )
        if not self.reports.idle:
            scale = self.loss_scale() if self.fp16_enabled() else None
            self.reports.step_ends(self.global_steps, self.global_samples, self.get_lr()[0], scale)

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]:
        """Around several backwards. Gradients add up by themselves, so there is nothing to do."""
        return nullcontext()

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        """Nothing to do: gradients cross the wire as they arrive, or with the first backward behind ``no_sync``."""

    def _need_optimizer(self, call: str) -> None:
        if self.optimizer is None:
            if self._destroyed:
                raise OptimizerError(
                    f"engine.{call}() after engine.destroy()",
                    where=type(self.module).__name__,
                    fix="give the model another engine with initialize",
                )
            raise OptimizerError(
                f"engine.{call}() of an engine without an optimizer",
                where=type(self.module).__name__,
                fix="pass optimizer= to initialize, or name one in the configuration",
            )


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            what = "without a graph"
        raise GradientError(
            f"the loss is {what}, where one number is needed that was computed from the model",
            where="engine.backward",
            fix="give a mean or a sum; for other gradients call output.backward(gradient)",
        )
