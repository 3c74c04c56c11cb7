"""What DeepSpeed's learning-rate schedules have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from shardwise.errors import ConfigError


class Schedule:
    """A schedule that sets the rate of each group for the number of steps that were taken.

    Args:
        optimizer: a torch optimizer, or what holds one in ``optimizer``.
        last_batch_iteration: the last step that was taken; -1 for none, which sets the first rates.
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int = -1) -> None:
        self.optimizer = torch_optimizer(optimizer)
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[Any] = [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:
        """The rate of each group after the last step."""
        raise NotImplementedError

    def get_last_lr(self) -> list[Any]:
        """The rates that were set last."""
        return self._last_lr

    def state_dict(self) -> dict[str, int]:
        """How far it is; rates follow from it."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Rates in the optimizer's groups are the optimizer's affair."""
        self.last_batch_iteration = state["last_batch_iteration"]
        self._last_lr = self.get_lr()

    def _go_to(self, iteration: int | None) -> None:
        self.last_batch_iteration = self.last_batch_iteration + 1 if iteration is None else iteration
        self._set(self.get_lr())

    def _set(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer that something is or holds.

    Raises:
        ConfigError: it is none, and holds none.
    """
    for _ in range(3):
        if isinstance(optimizer, Optimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    raise ConfigError("a schedule sets the rates of a torch optimizer", fix="give one, or what holds one in .optimizer")


def per_group(optimizer: Optimizer, value: Any, name: str) -> list[Any]:
    """A value for each group.

    Raises:
        ConfigError: as many values as there are not groups.
    """
    groups = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        return [value] * groups
    if len(value) != groups:
        raise ConfigError(f"{name} has {len(value)} values for {groups} groups", fix="one for each, or a number")
    return list(value)


def count(value: Any, name: str) -> int:
    """A number of steps.

    Raises:
        ConfigError: it is not a whole number of 1 or more.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} is not a number of steps", fix="a whole number of 1 or more")
    return value
