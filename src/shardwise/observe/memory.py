"""Exact peak memory of a sharded model's step, by state."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.engine.build import require_engine
from shardwise.observe.live import ACTIVATIONS, LiveBytes
from shardwise.tiers import STATES


class MemoryMeter(LiveBytes):
    """``with memory_meter(model) as m: step()``, then read ``m.peak`` and ``m.peak_total``.

    A metered step is slow: meter one step, not a run.

    Attributes:
        peak: bytes by state in the memory of the model's device at the moment of the joint peak; ``activations`` is
            every live tensor created inside the block that is no model state: saved activations, temporaries, inputs
            made there.
        peak_total: their sum.
        host_peak_total: the most bytes that were live on the host, of a device that has its own memory.
    """

    def __init__(self, module: nn.Module) -> None:
        engine = require_engine(module)
        device = next((b.device for unit in engine.units for b in unit.buckets), torch.device("cpu"))
        super().__init__(engine.ledger, device)
        self.peak_total = self.host_peak_total = 0
        self.peak: dict[str, int] = dict.fromkeys((*STATES, ACTIVATIONS), 0)

    @property
    def activations(self) -> int:
        """What is live now and is no model state, on the device."""
        return self._other[0]

    def sample(self) -> None:
        on_device, on_host = self.totals
        if on_device > self.peak_total:
            self.peak_total, self.peak = on_device, self.now().device
        self.host_peak_total = max(self.host_peak_total, on_host)


def memory_meter(module: nn.Module) -> MemoryMeter:
    """Measure exact live bytes of a sharded module inside a ``with`` block. See :class:`MemoryMeter`."""
    return MemoryMeter(module)
