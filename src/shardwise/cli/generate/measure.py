"""What a run takes: time, memory by tier, bytes from the disk, and how long it waited for what."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

from shardwise import device as devices
from shardwise.comm import World
from shardwise.engine.build import require_engine
from shardwise.engine.stored import StoredBucket
from shardwise.inference.plan import DEVICE, HOST, WeightsPlan
from shardwise.tiers.io_queue import DiskStats


class Meter:
    """Measures from here to :meth:`facts`.

    Args:
        module: a loaded model.
        plan: where its weights are.
    """

    def __init__(self, module: nn.Module, plan: WeightsPlan) -> None:
        self.engine, self.plan, self.world = require_engine(module), plan, World.current()
        buckets = [b for unit in self.engine.units for b in unit.buckets if isinstance(b, StoredBucket)]
        self.where = buckets[0].reading.device if buckets else devices.CPU
        self.files = buckets[0].reading.files if buckets else None
        self.engine.ledger.reset_peak()
        self.tokens = 0
        self.first_s: float | None = None  # from the first prompt to its first token
        self._disk, self._messages = self._read(), self._waited()
        self._begun = time.perf_counter()

    def token(self) -> None:
        """A token has been computed for each text of a batch."""
        if self.first_s is None:
            self.first_s = time.perf_counter() - self._begun

    def facts(self, load_s: float) -> dict[str, Any]:
        """Seconds, bytes and tokens of this rank.

        Args:
            load_s: seconds that loading took before.
        """
        seconds = time.perf_counter() - self._begun
        disk, peak = self._read(), self.engine.ledger.peak
        return {
            "tokens": self.tokens,
            "seconds": seconds,
            "first_s": self.first_s,
            "load_s": load_s,
            "host_peak": host_peak(),
            "device_peak": devices.peak_memory(self.where),
            "held_device": self.plan.total(DEVICE) if self.where.type != "cpu" else 0,
            "held_host": self.plan.total(HOST) + (self.plan.total(DEVICE) if self.where.type == "cpu" else 0),
            "streamed_peak": peak["gather_buffers"] + peak["offload_buffers"],
            "read": disk.bytes_read - self._disk.bytes_read,
            "disk_busy_s": disk.busy_s - self._disk.busy_s,
            "disk_wait_s": disk.wait_s - self._disk.wait_s,
            "ranks_wait_s": self._waited() - self._messages,
        }

    def _read(self) -> DiskStats:
        return DiskStats(**vars(self.files.stats)) if self.files is not None else DiskStats()

    def _waited(self) -> float:
        """Seconds for messages of other ranks."""
        return sum(count.wait_s for count in self.world.stats.kinds.values())


def host_peak() -> int:
    """The most bytes of host memory that this process has had."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
