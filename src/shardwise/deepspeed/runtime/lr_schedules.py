"""DeepSpeed's learning-rate schedules, with its arguments and its numbers. Steps are optimizer steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import cos, log, pi
from typing import Any

import torch

from shardwise.deepspeed.runtime.cycles import LRRangeTest, OneCycle
from shardwise.deepspeed.runtime.schedule_base import Schedule, count, per_group, torch_optimizer
from shardwise.deepspeed.runtime.schedule_words import SCHEDULES, WORDS, add_tuning_arguments
from shardwise.deepspeed_config.values import AUTO
from shardwise.errors import ConfigError, did_you_mean

__all__ = [
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "add_tuning_arguments",
    "build_scheduler",
]

VALID_LR_SCHEDULES = list(SCHEDULES.values())
_SHAPES = ("log", "linear")


def __getattr__(name: str) -> str:
    """The names of arguments as constants: ``WARMUP_MIN_LR``."""
    if name not in WORDS:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return WORDS[name]


class _Warmup(Schedule):
    """A part of the way up, by steps."""

    def __init__(self, optimizer: Any, steps: int, shape: str, last_batch_iteration: int) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if shape not in _SHAPES:
            raise ConfigError(
                f"warmup_type={shape!r} is not known", fix=did_you_mean(str(shape), _SHAPES, otherwise="log or linear")
            )
        self.warmup_type = shape
        self.warmup_num_steps = max(2, count(steps, "warmup_num_steps"))

    @property
    def _warming(self) -> bool:
        return self.last_batch_iteration < self.warmup_num_steps

    def _way_up(self) -> float:
        step = self.last_batch_iteration
        if self.warmup_type == "linear":
            return step / self.warmup_num_steps
        return (1.0 / log(self.warmup_num_steps)) * log(step + 1)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Set the rates for the next step, or for the one after ``last_batch_iteration``."""
        self._go_to(last_batch_iteration)


class WarmupLR(_Warmup):
    """From a small rate to a large one, which stays.

    Args:
        optimizer: a torch optimizer, or what holds one in ``optimizer``.
        warmup_min_lr: the first rate: a number, or one for each group.
        warmup_max_lr: the last one; ``None`` for those of the optimizer.
        warmup_num_steps: steps from one to the other.
        warmup_type: ``log``: fast at first; or ``linear``.
        last_batch_iteration: the last step that was taken; -1 for none.

    Raises:
        ConfigError: a value that has no meaning.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: Any = 0.0,
        warmup_max_lr: Any = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.min_lrs = per_group(self.optimizer, warmup_min_lr, "warmup_min_lr")
        self.max_lrs = per_group(self.optimizer, warmup_max_lr, "warmup_max_lr")
        if last_batch_iteration == -1:
            self._set(self.get_lr())

    def get_lr(self) -> list[float]:
        if self.last_batch_iteration < 0:
            return list(self.min_lrs)
        part = self._part()
        return [low + (high - low) * part for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _part(self) -> float:
        return self._way_up() if self._warming else 1.0


class WarmupDecayLR(WarmupLR):
    """As :class:`WarmupLR`, then down to 0 on a straight line.

    Args:
        total_num_steps: where the rate is 0.
        warmup_max_lr: as in :class:`WarmupLR`, but 0.001 unless it is said.

    Raises:
        ConfigError: a value that has no meaning.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: Any = 0.0,
        warmup_max_lr: Any = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _part(self) -> float:
        if self._warming:
            return self._way_up()
        left = self.total_num_steps - self.last_batch_iteration
        return max(0.0, float(left) / float(max(1.0, self.total_num_steps - self.warmup_num_steps)))


class WarmupCosineLR(_Warmup):
    """From a part of the optimizer's rates up to them, then down along a cosine.

    Args:
        optimizer: a torch optimizer, or what holds one in ``optimizer``.
        total_num_steps: where the cosine ends.
        warmup_min_ratio: the part to begin with.
        warmup_num_steps: steps up to the optimizer's own rates.
        cos_min_ratio: the part to end with.
        warmup_type: ``log`` or ``linear``.
        last_batch_iteration: the last step that was taken; -1 for none.

    Raises:
        ConfigError: a value that has no meaning.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps, self.warmup_min_ratio, self.cos_min_ratio = (
            total_num_steps, warmup_min_ratio, cos_min_ratio,
        )  # fmt: skip
        self.org_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        if last_batch_iteration == -1:
            self._set(self.get_lr())

    def get_lr_ratio(self) -> float:
        """The part of the optimizer's rates after the last step."""
        if self.last_batch_iteration < 0:
            return 0.0
        if self._warming:
            return self.warmup_min_ratio + self._way_up() * (1.0 - self.warmup_min_ratio)
        done = self.last_batch_iteration - self.warmup_num_steps + 1
        gone = min(1.0, done / max(1, self.total_num_steps - self.warmup_num_steps))
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * ((1 + cos(pi * gone)) / 2))

    def get_lr(self) -> list[float]:
        ratio = self.get_lr_ratio()
        return [rate * ratio for rate in self.org_lrs]


def build_scheduler(
    name: str, optimizer: Any, kwargs: Mapping[str, Any] | None = None, where: str = "scheduler"
) -> Any:
    """The schedule of a DeepSpeed configuration.

    ``"auto"`` is filled in for ``warmup_min_lr`` (0) and ``warmup_max_lr`` (the optimizer's rates).

    Args:
        name: one of DeepSpeed's, or a class of ``torch.optim.lr_scheduler``.
        optimizer: a torch optimizer, or what holds one in ``optimizer``.
        kwargs: the schedule's arguments, as in the configuration.
        where: for errors.

    Raises:
        ConfigError: an unknown name or argument, or one that is left at ``"auto"``.
    """
    ours = {key: globals()[key] for key in VALID_LR_SCHEDULES}
    theirs = {
        key: kind
        for key, kind in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.lr_scheduler.LRScheduler) and not key.startswith("_")
    }
    make: Any = ours.get(name) or theirs.get(name)
    if make is None:
        raise ConfigError(
            f"{where}.type={name!r} is not known",
            fix=did_you_mean(name, [*ours, *theirs], otherwise=f"one of {', '.join(ours)}, or of torch's"),
        )
    filled: dict[str, Any] = (
        {"warmup_min_lr": 0.0, "warmup_max_lr": None} if name in ("WarmupLR", "WarmupDecayLR") else {}
    )
    if name == "WarmupDecayLR":
        filled["warmup_max_lr"] = [float(group["lr"]) for group in torch_optimizer(optimizer).param_groups]
    known = [key for key in inspect.signature(make).parameters if key != "optimizer"]
    arguments = {}
    for key, value in (kwargs or {}).items():
        if key not in known:
            raise ConfigError(
                f"{where}.params.{key} is no argument of {name}",
                fix=did_you_mean(key, known, otherwise=f"one of {', '.join(known)}"),
            )
        if value == AUTO and key not in filled:
            raise ConfigError(
                f"{where}.params.{key} is 'auto', and nobody has filled it in",
                where=name,
                fix="give a value ('auto' is filled by Hugging Face's Trainer only)",
            )
        arguments[key] = filled[key] if value == AUTO else value
    missing = [
        key
        for key, parameter in inspect.signature(make).parameters.items()
        if parameter.default is inspect.Parameter.empty and key != "optimizer" and key not in arguments
    ]
    if missing:
        raise ConfigError(f"{where}.params has no {missing[0]}, which {name} needs", fix="give it a value")
    return make(torch_optimizer(optimizer), **arguments)
