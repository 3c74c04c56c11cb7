"""Flat values that are in files which somebody else wrote: read when they are needed, never written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from shardwise.errors import InternalError
from shardwise.tiers.aligned import aligned_empty
from shardwise.tiers.home import Home
from shardwise.tiers.offloaded_values import through_host
from shardwise.tiers.transfer import Transfer, TransferGroup

Read = Callable[[torch.Tensor], Transfer]


class Part(NamedTuple):
    """Bytes ``start:stop`` of the values, and how to begin to fill memory of that length on the CPU with them."""

    start: int
    stop: int
    read: Read


class StoredValues:
    """What a gather reads, in place of :class:`~shardwise.tiers.offloaded_values.OffloadedValues`.

    Args:
        home: has the buffers that they go through on their way to a device with memory of its own.
        nbytes: how many there are.
        parts: what is read; the rest is undefined.
    """

    on_disk = True

    def __init__(self, home: Home, nbytes: int, parts: Sequence[Part]) -> None:
        self.home, self.nbytes, self.parts = home, nbytes, list(parts)

    def read(self, buffer: torch.Tensor) -> list[Transfer]:
        """Start to bring them into the beginning of a buffer on the CPU, ``uint8``."""
        return [part.read(buffer[part.start : part.stop]) for part in self.parts]

    def fill(self, target: torch.Tensor) -> list[Transfer]:
        """Start to bring them into ``target``, ``uint8`` and contiguous, on the device."""
        if target.device.type == "cpu":
            return self.read(target)
        return [through_host(self.home, self.nbytes, self.read, target)]

    def copied(self) -> torch.Tensor:
        """In new host memory; what no part has is zero."""
        memory = aligned_empty(self.nbytes)
        TransferGroup(self.read(memory)).wait()
        return memory

    def settle(self) -> None:
        """Nobody writes to them."""

    def write(self, buffer: torch.Tensor) -> list[Transfer]:
        raise InternalError("weights of files were to be written to")
