"""Flat values (master values, or what gathers read) with a home, and views that come and go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from shardwise.tiers.aligned import padded
from shardwise.tiers.home import BufferLease, Home, StateExtent
from shardwise.tiers.link import Copy, Link, StreamOrdered
from shardwise.tiers.swapped_tensor import SwapLocation, swap_in, swap_out
from shardwise.tiers.transfer import Transfer, TransferGroup


class ValuesSource(Protocol):
    """What a gather reads, where that has a home of its own."""

    on_disk: bool

    def fill(self, target: torch.Tensor) -> list[Transfer]:
        """Start to copy the values into a tensor on the device."""

    def settle(self) -> None:
        """They are about to be written to: wait until no copy to the device reads them any more."""

    def write(self, buffer: torch.Tensor) -> list[Transfer]:
        """Start to write them out from the beginning of a buffer."""

    def copied(self) -> torch.Tensor:
        """A copy of them in new host memory."""


class OffloadedValues:
    """A flat tensor with a home, and views of it that come and go with it.

    Args:
        home: where it lives.
        name: for reports.
        tensor: 1-D, on the host; its bytes go to the home at once.
        views: with the element each one begins at; contiguous.
        disk: its home is the disk. Otherwise it is here always, and most methods are no-ops.
        state: what the ledger counts it as, where it is in memory.
    """

    def __init__(
        self,
        home: Home,
        name: str,
        tensor: torch.Tensor,
        views: Sequence[tuple[int, torch.Tensor]] = (),
        *,
        disk: bool,
        state: str = "optimizer",
    ) -> None:
        self.home, self.tensor, self.views, self.name = home, tensor, list(views), name
        self.on_disk = disk and tensor.nbytes > 0
        self.nbytes = padded(tensor.nbytes) if self.on_disk else 0
        self._own = tensor.nbytes
        self.resident = True
        self._leaving: Copy | None = None
        if self.on_disk:
            self.state_extent = StateExtent(home, f"{name} values", tensor.nbytes, whole=state == "parameters")
            TransferGroup(self.write(tensor.view(torch.uint8))).wait()
            self.swap_out()
        else:
            home.ledger.add(state, tensor.nbytes, host=tensor.is_cpu)

    def fill(self, target: torch.Tensor) -> list[Transfer]:
        """Start to copy them into ``target``, a contiguous tensor of equal size and dtype on the device.

        From a disk to a device with memory of its own they go through one of ``home.ahead`` buffers.
        """
        if not self.on_disk:
            if self.home.separate:
                self._leaving = self.home.link.to_device(self.tensor, target)
                return [StreamOrdered(self._leaving)]
            target.copy_(self.tensor)
            return []
        if not self.home.separate:
            return self.state_extent.read(target.view(torch.uint8))
        return [through_host(self.home, self.nbytes, self.read, target)]

    def settle(self) -> None:
        """They are about to be written to: wait until no copy to the device reads them any more."""
        if self._leaving is not None:
            self._leaving.wait()
            self._leaving = None

    def read(self, buffer: torch.Tensor) -> list[Transfer]:
        """Start to bring them into the beginning of a buffer."""
        return self.state_extent.read(buffer[: self._own])

    def copied(self) -> torch.Tensor:
        """A copy of them in new host memory."""
        if self.resident:
            return self.tensor.clone()
        memory = torch.empty(self._own, dtype=torch.uint8)
        TransferGroup(self.read(memory)).wait()
        return memory.view(self.tensor.dtype)

    def write(self, buffer: torch.Tensor) -> list[Transfer]:
        """Start to write them out from the beginning of a buffer, where :meth:`swap_in` put them."""
        return self.state_extent.write(buffer[: self._own])

    def swap_in(self, buffer: torch.Tensor) -> None:
        """They have arrived in the beginning of ``buffer``: let tensor and views be there."""
        swap_in(self.tensor, buffer[: self._own].view(self.tensor.dtype))
        for at, view in self.views:
            swap_in(view, self.tensor[at : at + view.numel()].view(view.shape))
        self.resident = True

    def swap_out(self) -> None:
        """Let go of the memory; the bytes are on the disk or on their way there."""
        size = self.tensor.element_size()
        for at, view in self.views:
            if view.numel():
                swap_out(view, SwapLocation(self.state_extent, at * size, self.name))
        swap_out(self.tensor, SwapLocation(self.state_extent, 0, self.name))
        self.resident = False

    def materialise(self) -> None:
        """Have them in memory of their own, outside of the buffers, until :meth:`write_back`."""
        if not self.resident:
            memory = torch.empty(self._own, dtype=torch.uint8)
            TransferGroup(self.read(memory)).wait()
            self.swap_in(memory)

    def write_back(self) -> None:
        """After :meth:`materialise`: write them out and let go."""
        if self.on_disk and self.resident:
            TransferGroup(self.write(self.tensor.view(torch.uint8))).wait()
            self.swap_out()


def through_host(
    home: Home, nbytes: int, read: Callable[[torch.Tensor], Sequence[Transfer]], target: torch.Tensor
) -> Transfer:
    """Start to bring values to a device with memory of its own, through one of ``home.ahead`` host buffers.

    Args:
        nbytes: of the buffer that is needed.
        read: starts to bring them into the beginning of a buffer.
        target: contiguous, on the device.
    """
    while len(home.prefetches) >= home.ahead:
        home.prefetches.popleft().send()
    lease = home.lease(nbytes, "values", home.ahead + 1)
    bounced = _BounceBufferRead(home.link, lease, read(lease.buffer), target)
    home.prefetches.append(bounced)
    return bounced


class _BounceBufferRead:
    """Values on their way from a disk into a host buffer and from there to the device."""

    def __init__(self, link: Link, lease: BufferLease, reads: Sequence[Transfer], target: torch.Tensor) -> None:
        self.link, self.lease, self.reads = link, lease, reads
        self.target: torch.Tensor | None = target  # until the copy has begun: a view of it would keep its bytes
        self._copy: Copy | None = None

    def send(self) -> Copy:
        """Once they are in the buffer: start the copy to the device. The buffer is free when that has ended."""
        if self._copy is None:
            for read in self.reads:
                read.wait()
            target, self.target = self.target, None
            assert target is not None
            self._copy = self.link.to_device(self.lease.buffer[: target.nbytes].view(target.dtype), target)
            self.lease.release([self._copy])
        return self._copy

    def wait(self) -> None:
        self.send().order()
