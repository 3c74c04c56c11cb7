"""Accumulation windows as DeepSpeed counts them: their length is given, and the script says where one ends."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.comm import World
from shardwise.engine.engine import Engine
from shardwise.stepping import Steps


class GivenWindows(Steps):
    """The accumulation state of one engine. Gradients end as their sum times ``gain / length``.

    However many micro-batches a window had: a script that ends it early divides by what it said. Backwards that the
    script runs by itself (``loss.backward()``) count like those that the engine runs. Without a scaler gradients are a
    sum until the window ends, so both simply add up. With one, losses are divided in advance, and a window overflows no
    sooner than one micro-batch does.

    Args:
        length: micro-batches per optimizer step.
        scaler: scales losses, for fp16.
        gain: 1 for means over ranks, the number of ranks for sums.
    """

    def __init__(self, length: int, scaler: torch.amp.GradScaler | None = None, gain: float = 1.0) -> None:
        self.gain = gain
        self._seen: dict[Engine, int] = {}  # backwards that there were before this window
        super().__init__(length, scaler, sync_with_dataloader=False)

    @property
    def in_advance(self) -> bool:
        """Losses are divided before their backward."""
        return self.scaler is not None

    @property
    def is_empty(self) -> bool:
        """No backward yet in this window."""
        return self._fresh and not self._took()

    def next_micro_batch(self, last: bool) -> None:
        """Begin one more.

        Args:
            last: of its window. May be corrected meanwhile, in ``sync_gradients``.
        """
        fresh = self.sync_gradients
        self.count(fresh, 1 if fresh else self.micro + 1, last, World.current().size)
        if fresh:
            self._seen = {engine: engine.backward_id for engine in self.engines()}

    def backward(self, loss: torch.Tensor, weight: float | None = None, **kwargs: Any) -> None:
        """Gradients of a loss that is divided by nothing yet."""
        if not self.in_advance:
            super().backward(loss, weight, **kwargs)
            return
        self._fresh = self._block_fresh = False
        self._run(loss, self._factor(), kwargs, weight)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss for a backward that the script runs by itself, where losses are scaled; else the loss."""
        if self.scaler is None:
            return loss
        scaled: torch.Tensor = self.scaler.scale(loss * self._factor())
        return scaled

    def more_comes(self) -> None:
        """Another backward is to add to gradients that may be means already."""
        if self._applied:
            self._unapply()

    def may_zero(self) -> bool:
        if self._took():
            self._fresh = False
        return super().may_zero()

    def after_plain_backward(self) -> None:
        """The script has run one, and may look at what it gave."""
        if self.sync_gradients and all(engine.sync for engine in self.engines()):
            self.settle()

    def settle(self) -> None:
        """Before gradients are used: they are what the optimizer is to see."""
        if not self.in_advance:
            if took := self._took():
                self._took_part |= took
                self._fresh = self._block_fresh = False
            factor = self._factor()
            if self._loose_applied != factor:
                self._scale_loose(factor / self._loose_applied)
                self._loose_applied = factor
        super().settle()

    def _took(self) -> set[Engine]:
        return {e for e in self.engines() if e.backward_id != self._seen.get(e, 0)}

    def _factor(self) -> float:
        return self.gain / self.length
