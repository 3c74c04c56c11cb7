"""The gradients of a bucket that is settled: autograd adds them up in ``p.grad``, and that is all there is to it.

Nobody else has a part in them, so they are not copied, reduced or shown: whatever ``p.grad`` holds is the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from shardwise.engine.gradients import Gradients


class OwnGradients(Gradients):
    """Of one rank alone. See :class:`~shardwise.engine.gradients.Gradients`."""

    _counted = 0  # bytes in the ledger

    def _grad(self, index: int) -> torch.Tensor:
        param = self.bucket.params[index]
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        return param.grad

    def count(self) -> None:
        """Tell the ledger what there is."""
        ledger = self.bucket.ledger
        found = [p.grad for p in self.bucket.params if p.grad is not None]
        nbytes = sum([grad.nbytes for grad in found])
        if nbytes == self._counted and ledger.observer is None:
            return
        ledger.add("gradients", -self._counted, host=self.bucket.device.type == "cpu")
        self._counted = nbytes
        for grad in found:
            ledger.adopt(grad, "gradients")

    # --- where they are -------------------------------------------------------------------------
    @property
    def there(self) -> bool:
        return any(p.grad is not None for p in self.bucket.params)

    def open(self, *, zeros: bool = True) -> torch.Tensor:
        """A copy of all of them in a flat buffer."""
        out = torch.zeros(self.bucket.layout.numel, dtype=self.bucket.master_dtype, device=self.bucket.device)
        for p, slot in zip(self.bucket.params, self.bucket.layout.slots, strict=True):
            if p.grad is not None:
                out[slot.offset : slot.stop].view(slot.shape).copy_(p.grad)
        return out

    def pieces(self, index: int) -> list[torch.Tensor]:
        return [self._grad(index)] if self.bucket.pieces[index] else []

    def whole(self, index: int) -> torch.Tensor:
        return self._grad(index)

    # --- one backward ---------------------------------------------------------------------------
    def read_flags(self) -> list[bool]:
        return []

    def are_summed(self) -> bool:
        return True

    def finish_reduce(self) -> None:
        return

    def free_zeroed(self) -> None:
        return

    def keep(self) -> None:
        return

    def forget(self) -> None:
        return

    # --- what others see ------------------------------------------------------------------------
    def show(self, index: int, param: nn.Parameter) -> None:
        return

    def show_all(self) -> None:
        return

    def is_shown(self, index: int, grad: torch.Tensor) -> bool:
        return True

    def all_for_step(self) -> Sequence[list[torch.Tensor] | None]:
        return [self.for_step(i) for i in range(len(self.bucket.params))]

    def for_step(self, index: int) -> list[torch.Tensor] | None:
        grad = self.bucket.params[index].grad
        return None if grad is None else [grad] if self.bucket.pieces[index] else []

    def zero(self, index: int) -> None:
        self._grad(index).zero_()

    def require_reduced(self, index: int) -> None:
        return
