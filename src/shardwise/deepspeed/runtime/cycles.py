"""Schedules that look for a rate, and that go round once (Smith 2018, arXiv 1803.09820)."""

from __future__ import annotations

from math import floor, isclose
from typing import Any

from shardwise.deepspeed.runtime.schedule_base import Schedule, count, per_group
from shardwise.errors import ConfigError


class LRRangeTest(Schedule):
    """A rate that grows without end, to see where a model no longer trains.

    Args:
        optimizer: a torch optimizer, or what holds one in ``optimizer``.
        lr_range_test_min_lr: the first rate: a number, or one for each group.
        lr_range_test_step_size: steps in which the rate grows once.
        lr_range_test_step_rate: by how many times the first rate it grows.
        lr_range_test_staircase: all at once, after that many steps.
        last_batch_iteration: the last step that was taken; -1 for none.

    Raises:
        ConfigError: a value that has no meaning.
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: Any = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = per_group(self.optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size = count(lr_range_test_step_size, "lr_range_test_step_size")
        self.step_rate, self.staircase = lr_range_test_step_rate, lr_range_test_staircase
        if last_batch_iteration == -1:
            self._set(self.min_lr)

    def get_lr(self) -> list[float]:
        done = float(self.last_batch_iteration + 1) / self.step_size
        growth = 1 + self.step_rate * (floor(done) if self.staircase else done)
        return [rate * growth for rate in self.min_lr]

    def step(self, batch_iteration: int | None = None) -> None:
        """Set the rates for the next step, or for the one after ``batch_iteration``."""
        self._go_to(batch_iteration)


class OneCycle(Schedule):
    """Rates up and down once, the momentum the other way, then both decay.

    Args:
        optimizer: a torch optimizer, or what holds one in ``optimizer``.
        cycle_min_lr, cycle_max_lr: limits of the rate: numbers, or one for each group.
        decay_lr_rate: by how much the rate decays after the cycle.
        cycle_first_step_size, cycle_second_step_size: steps up, and down (as many as up unless it is said).
        cycle_first_stair_count, cycle_second_stair_count: in so many stairs; 0 for a straight line.
        decay_step_size: steps in which the decay counts once; 0 for none.
        cycle_momentum: the first of the optimizer's ``betas`` moves too, if it has them.
        cycle_min_mom, cycle_max_mom: its limits.
        decay_mom_rate: by how much it grows after the cycle.
        last_batch_iteration: the last step that was taken; -1 for none.

    Raises:
        ConfigError: a value that has no meaning.
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: Any,
        cycle_max_lr: Any,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Any = 0.8,
        cycle_max_mom: Any = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.first_step_size = float(cycle_first_step_size)
        self.second_step_size = (
            self.first_step_size if cycle_second_step_size is None else float(cycle_second_step_size)
        )
        if self.first_step_size <= 0 or self.second_step_size < 0:
            raise ConfigError(
                f"a cycle of {self.first_step_size:g} steps up and {self.second_step_size:g} down",
                where="OneCycle",
                fix="cycle_first_step_size of more than 0, cycle_second_step_size of 0 or more",
            )
        self.total_size = self.first_step_size + self.second_step_size
        self.step_ratio = self.first_step_size / self.total_size
        self.first_stair_count = cycle_first_stair_count
        self.second_stair_count = (
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        )
        self.decay_step_size, self.decay_lr_rate, self.decay_mom_rate = decay_step_size, decay_lr_rate, decay_mom_rate
        self.min_lrs = per_group(self.optimizer, cycle_min_lr, "cycle_min_lr")
        self.max_lrs = per_group(self.optimizer, cycle_max_lr, "cycle_max_lr")
        self.cycle_momentum = cycle_momentum and "betas" in self.optimizer.defaults
        self.min_moms = per_group(self.optimizer, cycle_min_mom, "cycle_min_mom")
        self.max_moms = per_group(self.optimizer, cycle_max_mom, "cycle_max_mom")
        if last_batch_iteration == -1:
            self._set(self.min_lrs)
            self._set_momenta([(low, _SECOND) for low in self.min_moms])

    def get_lr(self) -> list[float]:
        if self.last_batch_iteration < self.total_size:
            scale = self._scale()
            return [low + (high - low) * scale for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        if self._no_decay(self.decay_lr_rate):
            return list(self.min_lrs)
        return [low / (1 + self.decay_lr_rate * self._decay_interval()) for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """``betas`` of each group after the last step; ``None`` if they do not move."""
        if not self.cycle_momentum:
            return None
        if self.last_batch_iteration < self.total_size:
            scale = self._scale()
            pairs = zip(self.min_moms, self.max_moms, strict=True)
            return [(high - (high - low) * scale, _SECOND) for low, high in pairs]
        if self._no_decay(self.decay_mom_rate):
            return [(high, _SECOND) for high in self.max_moms]
        return [(high * (1 + self.decay_mom_rate * self._decay_interval()), _SECOND) for high in self.max_moms]

    def step(self, batch_iteration: int | None = None) -> None:
        """Set rates and momenta for the next step, or for the one after ``batch_iteration``."""
        self._go_to(batch_iteration)
        self._set_momenta(self.get_mom())

    def _set_momenta(self, momenta: list[tuple[float, float]] | None) -> None:
        if not self.cycle_momentum or momenta is None:
            return
        for group, pair in zip(self.optimizer.param_groups, momenta, strict=False):
            group["betas"] = pair

    def _no_decay(self, rate: float) -> bool:
        return isclose(self.decay_step_size, 0) or isclose(rate, 0)

    def _decay_interval(self) -> float:
        return float((self.last_batch_iteration - self.total_size + 1) / self.decay_step_size)

    def _scale(self) -> float:
        """Where between the lower and the upper limit."""
        iteration = self.last_batch_iteration + 1
        ratio = self.step_ratio
        x = 1.0 + iteration / self.total_size - floor(1 + iteration / self.total_size)
        rising = x <= ratio
        stairs = self.first_stair_count if rising else self.second_stair_count
        if stairs <= 0:
            return x / ratio if rising else (x - 1) / (ratio - 1)
        # Counted in whole steps: the part of the way may be just below a stair by rounding.
        within = iteration % self.total_size
        if within <= self.first_step_size:
            return floor(within * stairs / self.first_step_size) / stairs
        return floor((self.total_size - within) * stairs / self.second_step_size) / stairs


_SECOND = 0.99
"""What DeepSpeed makes of the second beta while the first one moves."""
