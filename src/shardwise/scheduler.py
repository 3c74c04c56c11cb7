"""The learning-rate scheduler that :meth:`shardwise.Accelerator.prepare` returns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch.optim.lr_scheduler import OneCycleLR

from shardwise.optimizer import AcceleratedOptimizer
from shardwise.stepping import Steps


class AcceleratedScheduler:
    """A learning-rate scheduler that steps once per optimizer step that took place.

    Once, however many ranks there are: write schedules in optimizer steps.

    Args:
        scheduler: the inner one; everything but ``step`` is its own.
        optimizers: whose steps to follow.
        steps: their Accelerator's state.
        step_with_optimizer: if false, ``step()`` always steps.
        times: how far one step advances; the number of ranks, for those who ask for Accelerate's way of counting.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: list[AcceleratedOptimizer],
        steps: Steps,
        step_with_optimizer: bool = True,
        times: int = 1,
    ) -> None:
        self.scheduler, self.optimizers, self._steps = scheduler, optimizers, steps
        self.step_with_optimizer, self.times = step_with_optimizer, times
        steps.schedulers.append(self)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def _index(self) -> int:
        return self._steps.schedulers.index(self)

    @property
    def _has_ended(self) -> bool:
        """At its end. A step of several ranks may be longer than what is left of a schedule that has one.

        OneCycleLR raises beyond it; its last rate is that of the step before, and at the end it goes below.
        """
        end = getattr(self.scheduler, "total_steps", None)
        if not isinstance(end, int):
            return False
        last = end - 1 if isinstance(self.scheduler, OneCycleLR) else end
        return bool(self.scheduler.last_epoch >= last)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step at a boundary, unless fp16 skipped the optimizer's step."""
        idle = not self._steps.sync_gradients or any(o.step_was_skipped for o in self.optimizers)
        if self.step_with_optimizer and idle:
            return
        join = self._steps.join
        for _ in range(self.times if self.step_with_optimizer else 1):
            if self.times > 1 and self._has_ended:
                return
            with nullcontext() if join is None else join.event("schedule", None, self._index, args, kwargs):
                self.scheduler.step(*args, **kwargs)
