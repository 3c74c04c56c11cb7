"""Copies between a device and host memory, beside what the device computes."""

from __future__ import annotations

import itertools

import torch

from shardwise import device as devices
from shardwise import events

_NUMBERS = itertools.count()


class Copy:
    """A copy on its way; a :class:`shardwise.tiers.transfer.Transfer`. ``wait()`` blocks the host until it is done.

    Args:
        event: behind it, on a stream of ``device``; ``None`` if it is done.
        device: the one that it goes to or comes from.
        told: how listeners know it: its way and name; ``None``: nobody listened when it began, or it was waited for.
    """

    def __init__(
        self,
        event: torch.Event | None = None,
        device: torch.device = devices.CPU,
        told: tuple[str, str] | None = None,
    ) -> None:
        self._event, self._device, self._told = event, device, told

    def wait(self) -> None:
        told, self._told = self._told, None
        if told is not None:
            events.wait(*told)
        if self._event is not None:
            self._event.synchronize()
        if told is not None:
            events.waited(*told)

    @property
    def done(self) -> bool:
        return self._event is None or self._event.query()

    def order(self, stream: torch.Stream | None = None) -> None:
        """What the device is told from here on waits for it there; the host does not.

        Args:
            stream: where it is told so; by default what is current for the device, which need not be the current one.
        """
        told, self._told = self._told, None
        if told is not None:
            events.wait(*told)
        if self._event is not None:
            (stream or devices.current_stream(self._device)).wait_event(self._event)
        if told is not None:
            events.waited(*told)


class StreamOrdered:
    """A copy to the device as what fills a tensor there: ``wait()`` is :meth:`Copy.order`."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy

    def wait(self) -> None:
        self._copy.order()


class Link:
    """The way between one device and the host, with a stream of its own.

    On a CPU, and on a device without streams, copies are done when they return.

    Attributes:
        to_host_bytes, to_device_bytes: what crossed it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.to_host_bytes = self.to_device_bytes = 0
        self._late = devices.runs_late(device)
        self._stream: torch.Stream | None = None

    def to_host(self, source: torch.Tensor, host: torch.Tensor) -> Copy:
        """Start to copy into a host tensor of equal size, in the host tensor's dtype. Pinned ones do not block."""
        self.to_host_bytes += host.nbytes
        told = _tell(events.TO_HOST, host.nbytes)
        if not self._late:
            host.copy_(source)
            return Copy(told=told)
        low = source.to(host.dtype)  # before it crosses: half the bytes
        return Copy(self._beside(low, host, low), self.device, told)

    def to_device(self, host: torch.Tensor, target: torch.Tensor) -> Copy:
        """Start to copy into a device tensor of equal size and dtype; see :meth:`Copy.order`."""
        self.to_device_bytes += host.nbytes
        told = _tell(events.TO_DEVICE, host.nbytes)
        if not self._late:
            target.copy_(host)
            return Copy(told=told)
        return Copy(self._beside(host, target, target), self.device, told)

    def _beside(self, source: torch.Tensor, target: torch.Tensor, there: torch.Tensor) -> torch.Event:
        """Copy on the stream of our own, after what the device was told so far.

        Args:
            there: the one that is on the device. Its memory is not used for something else before the copy has
                ended, whatever becomes of the tensor: an exception may drop it at any moment.
        """
        stream = self.stream
        stream.wait_stream(devices.current_stream(self.device))
        with stream:
            target.copy_(source, non_blocking=True)
            there.record_stream(stream)
            return stream.record_event()

    @property
    def stream(self) -> torch.Stream:
        """A stream of its own."""
        if self._stream is None:
            self._stream = torch.Stream(self.device)
        return self._stream


def _tell(way: str, nbytes: int) -> tuple[str, str] | None:
    """Tell those who listen that a copy begins. Returns how they know it."""
    if not events.listeners:
        return None
    told = way, f"copy {next(_NUMBERS)}"
    events.start(*told, nbytes)
    return told
