"""fp16's loss scale, by DeepSpeed's rule.

The arithmetic on gradients is torch's ``GradScaler``; what follows an overflow, or a while without one, is decided
here. The rule is that of DeepSpeed's ZeRO optimizers, under every stage: stage 0 there knows no hysteresis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.amp.grad_scaler import _refresh_per_optimizer_state

from shardwise.deepspeed_config import LossScaling
from shardwise.errors import GradientError

_FACTOR = 2.0
_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScaler(torch.amp.GradScaler):
    """A scale that stays, or one that follows overflows.

    Args:
        device: type of the device that computes.
        rule: the numbers of the configuration.

    Attributes:
        cur_scale: what losses are multiplied by.
        cur_iter: updates so far.
        last_overflow_iter: the one that met the last overflow; -1 before the first.
        cur_hysteresis: overflows until the scale is halved, that one included.
    """

    def __init__(self, device: str, rule: LossScaling) -> None:
        self.rule = rule
        self.cur_scale = rule.initial if rule.static is None else rule.static
        self.cur_iter, self.last_overflow_iter = 0, -1
        self.cur_hysteresis = rule.hysteresis
        super().__init__(device, init_scale=self.cur_scale)

    @property
    def dynamic(self) -> bool:
        return self.rule.static is None

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def get_scale(self) -> float:
        return self.cur_scale

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Once per step, behind it.

        Args:
            new_scale: the scale from now on; by default the rule decides.

        Raises:
            GradientError: gradients overflow at the smallest scale there may be.
        """
        states = self._per_optimizer_states.values()
        overflow = any(bool(found) for state in states for found in state["found_inf_per_device"].values())
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        if new_scale is not None:
            self.cur_scale = float(new_scale)
        else:
            self.update_scale(overflow)
        self._tell()

    def update_scale(self, overflow: bool) -> None:
        """What the rule says behind a step with, or without, an overflow."""
        if self.dynamic and overflow:
            self._overflow()
        elif self.dynamic:
            self._no_overflow()
        self.cur_iter += 1

    def _overflow(self) -> None:
        rule = self.rule
        if self.cur_hysteresis > 1:  # one overflow alone may be chance
            self.cur_hysteresis -= 1
        elif self.cur_scale == rule.minimum:
            raise GradientError(
                f"gradients are not finite, and the loss scale is {self.cur_scale:g}, the smallest it may be",
                where="fp16",
                fix="look for inf or nan in the data and the loss; lower the learning rate; or train in bf16",
            )
        else:
            self.cur_scale = max(self.cur_scale / _FACTOR, rule.minimum)
        self.last_overflow_iter = self.cur_iter

    def _no_overflow(self) -> None:
        rule = self.rule
        steady = self.cur_iter - self.last_overflow_iter - 1
        grows = steady > 0 and steady % rule.window == 0
        if rule.consecutive_hysteresis or grows:
            self.cur_hysteresis = rule.hysteresis
        if grows:
            self.cur_scale *= _FACTOR

    def _tell(self) -> None:
        """Losses are multiplied by a tensor, which is there once a loss was."""
        self._init_scale = self.cur_scale
        if self._scale is not None:
            self._scale.fill_(self.cur_scale)

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _STATE}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state, under the numbers of this configuration. A scale that stays is the configuration's."""
        for key in _STATE:
            if key in state_dict and (self.dynamic or key == "cur_iter"):
                value = state_dict[key]
                setattr(self, key, float(value) if key == "cur_scale" else int(value))
        self._tell()
