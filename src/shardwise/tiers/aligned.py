"""Host memory for direct I/O: page-aligned tensors, and a pool of a fixed number of them."""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import torch

from shardwise import device
from shardwise.errors import OffloadError
from shardwise.tiers.planned import without_values
from shardwise.tiers.transfer import Transfer

ALIGN = 4096
"""Bytes. Direct I/O wants addresses, offsets and lengths in multiples of the disk's block, which is 512 or 4096."""

HUGE = 2 << 20


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to a multiple of :data:`ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN


def _map(nbytes: int) -> mmap.mmap:
    """Private pages outside of malloc's heap, so that they start at a page and go back to the system when freed.

    Huge ones where the kernel has them: a direct request lists its pages, and with large ones it took half the time.
    """
    pages = mmap.mmap(-1, max(padded(nbytes), ALIGN), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(
        mmap, "MADV_DONTFORK"
    ):  # a dataloader's fork during a direct read would send the bytes to the wrong copy
        pages.madvise(mmap.MADV_DONTFORK)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= HUGE:
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without huge pages: only a hint is lost
            return pages
    return pages


def aligned_empty(nbytes: int) -> torch.Tensor:
    """A new host tensor of ``nbytes`` zeros, ``uint8``, whose address is a multiple of :data:`ALIGN`.

    Forked children do not have it: they end if they touch it.
    """
    if without_values():
        return torch.empty(nbytes, dtype=torch.uint8)
    # Not a slice: its base would be one more tensor that has the memory.
    return (
        torch.frombuffer(_map(nbytes), dtype=torch.uint8, count=nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)
    )


class BufferPool:
    """A fixed number of aligned host buffers, used again and again.

    Args:
        count: how many buffers.
        nbytes: the length of each; rounded up to a multiple of :data:`ALIGN`.
        pin: page-lock them, so that copies to and from a device are asynchronous.

    Cost: ``count * nbytes`` bytes of host memory, all of it taken when first written to (at once with ``pin``).

    Raises:
        OffloadError: ``count`` is below 1, or ``pin`` without an accelerator, or more than may be locked.
    """

    def __init__(self, count: int, nbytes: int, *, pin: bool = False) -> None:
        if count < 1 or nbytes < 1:
            raise OffloadError(f"a pool of {count} buffers of {nbytes} bytes", fix="ask for at least one of each")
        if pin and device.accelerator() is None:
            raise OffloadError("pinned host buffers need an accelerator, and there is none", fix="pin_memory=False")
        self.count, self.buffer_bytes, self.pinned = count, padded(nbytes), pin
        self.peak_in_use = 0
        fake = without_values()
        own = (not pin or device.locks_pages()) and not fake
        maps = [_map(self.buffer_bytes) for _ in range(count if own else 0)]
        buffers = [torch.frombuffer(pages, dtype=torch.uint8) for pages in maps]
        registered: list[int] = []
        # The finalizer holds the pages: they must be unlocked before they are unmapped.
        self._leaving: deque[tuple[Transfer, torch.Tensor]] = deque()
        self._finalizer = weakref.finalize(self, _unpin, registered, maps, self._leaving)
        if fake:
            buffers = [torch.empty(self.buffer_bytes, dtype=torch.uint8) for _ in range(count)]
        elif not own:
            buffers = [_pinned(self.buffer_bytes) for _ in range(count)]
        elif pin:
            for buffer in buffers:
                _pin(buffer, registered)
        self._free: deque[torch.Tensor] = deque(buffers)
        self._used: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.count * self.buffer_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the buffers that are taken, or given back and still being written out."""
        return (len(self._used) + len(self._leaving)) * self.buffer_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that :attr:`live_bytes` has been."""
        return self.peak_in_use * self.buffer_bytes

    def acquire(self) -> torch.Tensor:
        """Take a buffer, ``uint8``; its values are undefined.

        If none is free, waits for the transfer that has been under way longest (see :meth:`release`).

        Raises:
            OffloadError: all are taken and none is on its way back, or the awaited transfer failed.
        """
        if not self._free and self._leaving:
            transfer, buffer = self._leaving[0]
            transfer.wait()
            self._leaving.popleft()
            self._free.append(buffer)
        if not self._free:
            raise OffloadError(
                f"all {self.count} host buffers of {self.buffer_bytes} bytes are in use",
                fix="release one before the next is acquired, or raise the number of buffers",
            )
        buffer = self._free.popleft()
        self._used[start_of(buffer)] = buffer
        self.peak_in_use = max(self.peak_in_use, len(self._used) + len(self._leaving))
        return buffer

    def release(self, buffer: torch.Tensor, after: Transfer | None = None) -> None:
        """Give a buffer back, or any view that starts where it starts.

        Args:
            buffer: what :meth:`acquire` returned.
            after: a transfer that still reads or fills it; the buffer is free when that has ended.
        """
        own = self._used.pop(start_of(buffer), None)
        if own is None:
            raise OffloadError(
                "released a tensor that is not a buffer in use of this pool", fix="release each one once"
            )
        if after is None:
            self._free.append(own)
        else:
            self._leaving.append((after, own))


def start_of(buffer: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins, also of those that have no address."""
    return buffer.untyped_storage()._cdata, int(buffer.storage_offset()) * buffer.element_size()


def _pin(buffer: torch.Tensor, registered: list[int]) -> None:
    # Not torch's pinned allocator: it rounds up to powers of two, nearly twice the bytes at worst.
    code = device.lock_pages(buffer)
    if code != 0:
        raise OffloadError(
            f"the driver could not lock a host buffer of {buffer.numel()} bytes (error {code})",
            fix="fewer or smaller buffers, a higher `ulimit -l`, or pin_memory=False",
        )
    registered.append(buffer.data_ptr())


def _unpin(registered: list[int], maps: list[mmap.mmap], leaving: deque[tuple[Transfer, torch.Tensor]]) -> None:
    try:
        while leaving:  # a device or a disk would go on with pages that are somebody else's by then
            leaving.popleft()[0].wait()
    finally:
        for pointer in registered:
            device.unlock_pages(pointer)
        registered.clear()
        maps.clear()


def _pinned(nbytes: int) -> torch.Tensor:
    """From torch's pinned memory, for devices whose drivers lock no memory of ours."""
    room = torch.empty(nbytes + ALIGN, dtype=torch.uint8, pin_memory=True)
    start = -room.data_ptr() % ALIGN
    return room[start : start + nbytes]
