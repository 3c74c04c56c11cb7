"""What the parts of an engine share: its attributes, typed, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardwise.deepspeed.optimizer import DeepSpeedOptimizer
from shardwise.deepspeed.reports import Reports
from shardwise.deepspeed.windows import GivenWindows
from shardwise.deepspeed_config import DsFacts
from shardwise.scheduler import AcceleratedScheduler
from shardwise.strategy import Strategy


class EngineBase(nn.Module):
    """The state of one engine. Two of them share nothing but the process group.

    Attributes:
        module: the caller's own model, sharded in place.
        optimizer: ``None`` for an engine that only runs its model.
        lr_scheduler: the caller's own, or the configuration's; :meth:`step` steps it.
        training_dataloader: of ``training_data``.
        facts: what the configuration says; ``config``: the configuration itself.
        micro_steps: calls of :meth:`step`; ``global_steps``: those at a window's end; ``global_samples``: samples that
            went into them; ``skipped_steps``: of them, those that were skipped because gradients were not finite.
    """

    module: nn.Module
    optimizer: DeepSpeedOptimizer | None
    lr_scheduler: Any
    training_dataloader: Any
    collate_fn: Any
    client_optimizer: Any
    client_lr_scheduler: Any
    mpu: Any
    reports: Reports
    facts: DsFacts
    config: dict[str, Any]
    strategy: Strategy
    device: torch.device
    local_rank: int
    global_rank: int
    world_size: int

    micro_steps: int
    global_steps: int
    global_samples: int
    skipped_steps: int

    _steps: GivenWindows
    _scheduler: AcceleratedScheduler | None
    _train_batch: int
    _micro_batch: int
