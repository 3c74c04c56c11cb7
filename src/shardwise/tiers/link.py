"""Copies between a device and host memory, beside what the device computes."""

from __future__ import annotations

import torch


class Copy:
    """A copy on its way; a :class:`shardwise.tiers.transfer.Transfer`. ``wait()`` blocks the host until it is done."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self.event = event

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    @property
    def done(self) -> bool:
        return self.event is None or self.event.query()


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
        low.record_stream(self._side())
        return Copy(event)

    def to_device(self, host: torch.Tensor, target: torch.Tensor) -> Copy:
        """Start to copy into a device tensor of equal size and dtype. What the device does next waits for it there."""
        copy = self.ahead(host, target)
        self.join(copy)
        return copy

    def ahead(self, host: torch.Tensor, target: torch.Tensor) -> Copy:
        """As :meth:`to_device`, but the device waits for it at :meth:`join`. Keep ``target`` until then."""
        self.to_device_bytes += host.nbytes
        if self.device.type != "cuda":
            target.copy_(host)
            return Copy()
        return Copy(self._beside(host, target))

    def join(self, copy: Copy) -> None:
        """What the device does next waits for ``copy`` there."""
        if copy.event is not None:
            torch.cuda.current_stream(self.device).wait_event(copy.event)

    def _beside(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Copy on the stream of our own, after what the device was told so far."""
        stream = self._side()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream
