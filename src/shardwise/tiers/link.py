"""Copies between a device and host memory, beside what the device computes."""

from __future__ import annotations

import torch


class Copy:
    """A copy on its way; a :class:`shardwise.tiers.transfer.Transfer`. ``wait()`` blocks the host until it is done."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    @property
    def done(self) -> bool:
        return self._event is None or self._event.query()

    def order(self) -> None:
        """What the device is told from here on waits for it there; the host does not."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class StreamOrdered:
    """A copy to the device as what fills a tensor there: ``wait()`` is :meth:`Copy.order`."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy

    def wait(self) -> None:
        self._copy.order()


class Link:
    """The way between one device and the host, with a stream of its own. On a CPU device copies are done at once.

    Attributes:
        to_host_bytes, to_device_bytes: what crossed it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.to_host_bytes = self.to_device_bytes = 0
        self._stream: torch.cuda.Stream | None = None

    def to_host(self, source: torch.Tensor, host: torch.Tensor) -> Copy:
        """Start to copy into a host tensor of equal size, in the host tensor's dtype. Pinned ones do not block."""
        self.to_host_bytes += host.nbytes
        if self.device.type != "cuda":
            host.copy_(source)
            return Copy()
        low = source.to(host.dtype)  # before it crosses: half the bytes
        event = self._beside(low, host)
        low.record_stream(self.stream)
        return Copy(event)

    def to_device(self, host: torch.Tensor, target: torch.Tensor) -> Copy:
        """Start to copy into a device tensor of equal size and dtype; see :meth:`Copy.order`."""
        self.to_device_bytes += host.nbytes
        if self.device.type != "cuda":
            target.copy_(host)
            return Copy()
        return Copy(self._beside(host, target))

    def _beside(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Copy on the stream of our own, after what the device was told so far."""
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    @property
    def stream(self) -> torch.cuda.Stream:
        """A stream of its own."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream
