"""Names of ``accelerate.utils.deepspeed``: a configuration that is asked, and what stands for parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from shardwise.compat.refused_names import refused_when_called
from shardwise.deepspeed_config.asked import AskedConfig

__all__ = ["DeepSpeedSchedulerWrapper", "DummyOptim", "DummyScheduler", "HfDeepSpeedConfig"]


class HfDeepSpeedConfig(AskedConfig):
    """A DeepSpeed configuration, asked key by key.

    Args:
        config_file_or_dict: a dict, which is copied, the path of a file, or JSON as text or in base64.

    Raises:
        ConfigError: none of these.
    """


class DummyOptim:
    """Stands for the optimizer that a DeepSpeed configuration describes.

    Args:
        params: parameters, or groups of them.
        lr, weight_decay, kwargs: where the configuration says ``auto``.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.001, weight_decay: float = 0, **kwargs: Any) -> None:
        self.params, self.lr, self.weight_decay, self.kwargs = params, lr, weight_decay, kwargs


class DummyScheduler:
    """Stands for the schedule that a DeepSpeed configuration describes.

    Args:
        optimizer: what it schedules, a :class:`DummyOptim` too.
        total_num_steps, warmup_num_steps, kwargs: where the configuration says ``auto``.
        lr_scheduler_callable: makes the schedule from the optimizer, where the configuration has none.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer, self.total_num_steps, self.warmup_num_steps = optimizer, total_num_steps, warmup_num_steps
        self.lr_scheduler_callable, self.kwargs = lr_scheduler_callable, kwargs


# transformers asks whether its schedule is one. None is: DeepSpeed itself does not run.
_HOW = "give prepare() torch's own scheduler"
DeepSpeedSchedulerWrapper: Any = refused_when_called("DeepSpeedSchedulerWrapper", _HOW)
