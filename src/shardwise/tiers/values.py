"""Flat values (master values, or what gathers read) with a home, and views that come and go with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.tiers.aligned import padded
from shardwise.tiers.home import All, Home, Loan, Shelf
from shardwise.tiers.link import Copy, Link, Ordered
from shardwise.tiers.staged import Place, bring, send_away
from shardwise.tiers.transfer import Transfer


class Values:
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
        self.here = True
        if self.on_disk:
            self.shelf = Shelf(home, f"{name} values", tensor.nbytes, whole=state == "parameters")
            All(self.write(tensor.view(torch.uint8))).wait()
            self.send_away()
        else:
            home.ledger.add(state, tensor.nbytes)

    def fill(self, target: torch.Tensor) -> list[Transfer]:
        """Start to copy them into ``target``, a contiguous tensor of equal size and dtype on the device.

        From a disk to a device with memory of its own they go through one of ``home.ahead`` buffers.
        """
        if not self.on_disk:
            if self.home.separate:
                return [Ordered(self.home.link.to_device(self.tensor, target))]
            target.copy_(self.tensor)
            return []
        if not self.home.separate:
            return self.shelf.read(target.view(torch.uint8))
        under_way = self.home.under_way
        while len(under_way) >= self.home.ahead:
            under_way.popleft().send()
        loan = self.home.lend(self.nbytes, "values", self.home.ahead + 1)
        through = _Through(self.home.link, loan, self.shelf.read(loan.buffer[: self._own]), target)
        under_way.append(through)
        return [through]

    def read(self, buffer: torch.Tensor) -> list[Transfer]:
        """Start to bring them into the beginning of a buffer."""
        return self.shelf.read(buffer[: self._own])

    def write(self, buffer: torch.Tensor) -> list[Transfer]:
        """Start to write them out from the beginning of a buffer, where :meth:`bring` put them."""
        return self.shelf.write(buffer[: self._own])

    def bring(self, buffer: torch.Tensor) -> None:
        """They have arrived in the beginning of ``buffer``: let tensor and views be there."""
        bring(self.tensor, buffer[: self._own].view(self.tensor.dtype))
        for at, view in self.views:
            bring(view, self.tensor[at : at + view.numel()].view(view.shape))
        self.here = True

    def send_away(self) -> None:
        """Let go of the memory; the bytes are on the disk or on their way there."""
        size = self.tensor.element_size()
        for at, view in self.views:
            if view.numel():
                send_away(view, Place(self.shelf, at * size, self.name))
        send_away(self.tensor, Place(self.shelf, 0, self.name))
        self.here = False

    def materialise(self) -> None:
        """Have them in memory of their own, outside of the buffers, until :meth:`settle`."""
        if not self.here:
            memory = torch.empty(self._own, dtype=torch.uint8)
            All(self.read(memory)).wait()
            self.bring(memory)

    def settle(self) -> None:
        """After :meth:`materialise`: write them out and let go."""
        if self.on_disk and self.here:
            All(self.write(self.tensor.view(torch.uint8))).wait()
            self.send_away()


class _Through:
    """Values on their way from a disk into a host buffer and from there to the device."""

    def __init__(self, link: Link, loan: Loan, reads: Sequence[Transfer], target: torch.Tensor) -> None:
        self.link, self.loan, self.reads, self.target = link, loan, reads, target
        self._copy: Copy | None = None

    def send(self) -> Copy:
        """Once they are in the buffer: start the copy to the device. The buffer is free when that has ended."""
        if self._copy is None:
            for read in self.reads:
                read.wait()
            n = self.target.nbytes
            self._copy = self.link.to_device(self.loan.buffer[:n].view(self.target.dtype), self.target)
            self.loan.release([self._copy])
        return self._copy

    def wait(self) -> None:
        self.send().order()
