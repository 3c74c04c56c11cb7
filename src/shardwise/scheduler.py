"""The learning-rate scheduler that :meth:`shardwise.Accelerator.prepare` returns."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import OneCycleLR

from shardwise.stepping import Steps

if TYPE_CHECKING:
    from shardwise.gradient_state import GradientState


class AcceleratedScheduler:
    """A learning-rate scheduler that steps once per optimizer step that took place.

    Once, however many ranks there are: write schedules in optimizer steps.

    Made by :meth:`shardwise.Accelerator.prepare`; or by hand, for the Accelerator that was made last.

    Args:
        scheduler: the inner one; everything but ``step`` is its own.
        optimizers: whose steps to follow: one, or several.
        step_with_optimizer: if false, ``step()`` always steps.
        split_batches: makes no difference here: one step of the optimizer is one step of the schedule in any case.
        steps: their Accelerator's state; by default that of the Accelerator that was made last.
        times: how far one step advances; the number of ranks, for those who ask for Accelerate's way of counting.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any,
        step_with_optimizer: bool = True,
        split_batches: bool = False,
        *,
        steps: Steps | None = None,
        times: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers: list[Any] = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        self._said = False  # that it has ended
        self.step_with_optimizer, self.split_batches, self.times = step_with_optimizer, split_batches, times
        self._follow(Steps.newest() if steps is None else steps)

    def _follow(self, steps: Steps) -> None:
        self._steps = steps
        steps.schedulers.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_steps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._follow(Steps.newest())

    @property
    def gradient_state(self) -> GradientState:
        """Where its Accelerator is in the accumulation window."""
        return self._steps.gradient_state

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def _index(self) -> int:
        return self._steps.schedulers.index(self)

    @property
    def _has_ended(self) -> bool:
        """At its end. Scripts step on, because nobody counts the last, short batches of epochs; the rate then stays.

        OneCycleLR raises beyond it. Its last rate is that of the step before, and at the end it goes below: where one
        step of several ranks may be longer than what is left, it ends there.
        """
        end = getattr(self.scheduler, "total_steps", None)
        if not isinstance(end, int):
            return False
        last = end - 1 if self.times > 1 and isinstance(self.scheduler, OneCycleLR) else end
        return bool(self.scheduler.last_epoch >= last)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step at a boundary, unless fp16 skipped the optimizer's step."""
        idle = not self._steps.sync_gradients or any(getattr(o, "step_was_skipped", False) for o in self.optimizers)
        if self.step_with_optimizer and idle:
            return
        join = self._steps.join
        for _ in range(self.times if self.step_with_optimizer else 1):
            if self.step_with_optimizer and self._has_ended:
                if self.times == 1 and not self._said:
                    self._said = True
                    name, end = type(self.scheduler).__name__, self.scheduler.total_steps
                    warnings.warn(f"{name} has ended after total_steps={end}: the learning rate stays", stacklevel=2)
                return
            with nullcontext() if join is None else join.event("schedule", None, self._index, args, kwargs):
                self.scheduler.step(*args, **kwargs)
