"""The optimizer that ``initialize`` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from shardwise.deepspeed.loss_scaler import LossScaler
from shardwise.deepspeed.windows import GivenWindows
from shardwise.engine.clip import clip_grad_norm_, grad_norm
from shardwise.optimizer import AcceleratedOptimizer


class DeepSpeedOptimizer(AcceleratedOptimizer):
    """A torch optimizer that steps where a window ends, clips, and skips steps with gradients that are not finite.

    Everything else is the inner optimizer's, which is ``optimizer``.

    Args:
        optimizer: the inner one.
        steps: its engine's windows.
        measure: compute the norm of the gradients at every step, also without clipping.
        check_finite: without loss scaling, too, skip steps whose gradients are not finite. A device is waited for.

    Attributes:
        states: moves states between device and host; its engine.
        norm: of the gradients of the last step, before clipping; ``None`` if it was not computed.
    """

    def __init__(self, optimizer: Optimizer, steps: GivenWindows, measure: bool, check_finite: bool) -> None:
        super().__init__(optimizer, False, steps=steps)
        self.measure, self.check_finite = measure, check_finite
        self.norm: torch.Tensor | None = None
        self.states: Callable[[], Any] = lambda: None

    def step(self, closure: Any = None) -> Any:
        self.norm = None
        return super().step(closure)

    def _ready(self) -> bool:
        params = list(self.parameters())
        if self._steps.max_norm is not None:
            self.norm = clip_grad_norm_(params, self._steps.max_norm)
        elif self.measure or self.check_finite:
            self.norm = grad_norm(params)
        if not self.check_finite or self._steps.scaler is not None:
            return True
        assert self.norm is not None
        return bool(torch.isfinite(self.norm))

    # --- as DeepSpeed's optimizers are asked ---------------------------------------------------
    @property
    def loss_scaler(self) -> LossScaler | None:
        scaler = self._steps.scaler
        assert scaler is None or isinstance(scaler, LossScaler)
        return scaler

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by; 1 but for fp16."""
        return 1.0 if self.loss_scaler is None else self.loss_scaler.cur_scale

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return self.loss_scaler is not None and self.loss_scaler.dynamic

    def needs_scaler(self) -> bool:
        """Losses have to be scaled before their backward: ``engine.backward`` does it, or ``engine.scale``."""
        return self.loss_scaler is not None

    @property
    def overflow(self) -> bool:
        """The last step was skipped."""
        return self.step_was_skipped

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Its engine's ``offload_states``."""
        if (engine := self.states()) is not None:
            engine.offload_states(*args, **kwargs)

    def reload_states(self, *args: Any, **kwargs: Any) -> None:
        """Its engine's ``reload_states``."""
        if (engine := self.states()) is not None:
            engine.reload_states(*args, **kwargs)
