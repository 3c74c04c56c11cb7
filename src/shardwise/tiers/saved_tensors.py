"""What autograd saves for backward, in host memory until backward asks for it.

:meth:`SavedOnHost.hooks` is a pair of torch's saved-tensor hooks. What is moved is a storage, once, however many
tensors in it are saved. It comes back under the same strides and offsets, so that backward computes the same bits. On
a device that runs late copies go on beside what it computes, and in backward each storage that is asked for begins to
bring the one that was saved before it, which is asked for next.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from shardwise import device as devices
from shardwise.errors import OffloadError
from shardwise.tiers.ledger import Ledger
from shardwise.tiers.link import Copy, Link
from shardwise.tiers.planned import is_plain

STATE = "host_activations"
SMALLEST = 1024
"""Bytes. Storages below it stay: a copy would cost more time than they take room."""
_PART = 8  # a tensor that is less than this part of its storage stays: somebody else holds the rest
_IN_FLIGHT = 1 << 28  # bytes on their way to the host, which are still on the device too


class OtherPacker(Protocol):
    """Packs tensors that have a way of their own from forward to backward."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """What stands for the tensor; ``None``: it is moved as any other."""

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor that :meth:`pack` was given."""


class SavedOnHost:
    """The saved tensors of one model that are on the host.

    Args:
        device: where the model computes.
        ledger: counts the host's bytes, under ``host_activations``.
        other: packs tensors that are never moved: views of flat buffers, which come and go by themselves.
        pin: page-lock host memory, so that copies to and from a device run beside its work. torch's allocator for
            it rounds sizes up to powers of two.
        separate: the device's memory is not the host's; by default what the device says. Where it is, nothing moves.
    """

    def __init__(
        self,
        device: torch.device,
        ledger: Ledger,
        other: OtherPacker,
        *,
        pin: bool = True,
        separate: bool | None = None,
    ) -> None:
        self.ledger, self.other = ledger, other
        self.link = Link(device)
        self.separate = device.type != "cpu" if separate is None else separate
        self.pin = pin and devices.can_pin(device)
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage -> its version and _Bytes, by weak reference
        self._last: weakref.ref[_Bytes] | None = None
        self._leaving: deque[tuple[Copy, torch.Tensor, int]] = deque()
        self._leaving_bytes = 0

    def hooks(self) -> saved_tensors_hooks:
        """A context manager. What autograd saves inside of it is moved."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        elsewhere = self.other.pack(tensor)
        if elsewhere is not None:
            return _PackedElsewhere(elsewhere)
        # Detached, since what is returned is held by the node that made the tensor.
        plain = tensor.detach()
        if not self._moves(plain):
            return plain
        storage, version = plain.untyped_storage(), plain._version
        found, moved = self._known.get(storage, (None, None))
        held = moved() if moved is not None and found == version else None
        if held is None:
            if plain.numel() * plain.element_size() * _PART < storage.nbytes():
                return plain
            held = self._take(plain, storage, version)
        return _Saved(held, plain.dtype, plain.size(), plain.stride(), int(plain.storage_offset()))

    def _moves(self, tensor: torch.Tensor) -> bool:
        return (
            is_plain(tensor)
            and tensor.layout is torch.strided
            and tensor.device == self.link.device
            and not (tensor.is_conj() or tensor.is_neg())  # their values are not what is in the storage
            and tensor.untyped_storage().nbytes() >= SMALLEST
        )

    def _take(self, tensor: torch.Tensor, storage: torch.UntypedStorage, version: int) -> _Bytes:
        self.drain(_IN_FLIGHT - storage.nbytes())
        host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self.pin)
        self.ledger.adopt(host, STATE)
        held = _Bytes(self, host, self._last)
        copy = self.link.to_host(self._bytes(storage), host)
        if not copy.done:
            self._leaving.append((copy, tensor, version))
            self._leaving_bytes += storage.nbytes()
        self._known[storage] = version, weakref.ref(held)
        self._last = weakref.ref(held)
        return held

    def _bytes(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.link.device).set_(storage)

    def drain(self, room: int = 0) -> None:
        """Wait until at most ``room`` bytes are on their way to the host.

        Raises:
            OffloadError: one of them was changed meanwhile.
        """
        while self._leaving and (self._leaving_bytes > room or self._leaving[0][0].done):
            copy, tensor, version = self._leaving.popleft()
            copy.wait()
            self._leaving_bytes -= tensor.untyped_storage().nbytes()
            if tensor._version != version:
                raise OffloadError(
                    f"a tensor of shape {tuple(tensor.shape)} that backward needs was changed in place",
                    where="the offload of activations",
                    fix="change a copy of it, or leave out activation_offload",
                )

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _PackedElsewhere):
            return self.other.unpack(packed.packed)
        if not isinstance(packed, _Saved):
            return packed
        self.drain(_IN_FLIGHT)
        storage = packed.held.fetch()
        before = packed.held.before
        if before is not None and (earlier := before()) is not None:
            earlier.start()
        # Not the storage's device: one without bytes says it has none.
        view = torch.empty(0, dtype=packed.dtype, device=self.link.device)
        return view.set_(storage, packed.offset, packed.size, packed.stride)


class _PackedElsewhere(NamedTuple):
    """What somebody else has packed."""

    packed: Any


class _Saved(NamedTuple):
    """A tensor in a storage that is on the host."""

    held: _Bytes
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Bytes:
    """One storage's bytes on the host, while anything in it is saved.

    Attributes:
        before: what was saved before it.
        on_device: the storage that it was copied to, while that is alive. Not the one it was copied from: that may
            have been changed since.
    """

    __slots__ = ("__weakref__", "_coming", "before", "host", "on_device", "owner")

    def __init__(self, owner: SavedOnHost, host: torch.Tensor, before: weakref.ref[_Bytes] | None) -> None:
        self.owner, self.host, self.before = owner, host, before
        self.on_device: weakref.ref[torch.UntypedStorage] | None = None
        self._coming: tuple[torch.UntypedStorage, Copy] | None = None

    def start(self) -> None:
        """Begin to bring it to the device, unless it is there or on its way."""
        if self._coming is None and (self.on_device is None or self.on_device() is None):
            target = torch.empty(self.host.numel(), dtype=torch.uint8, device=self.owner.link.device)
            self._coming = target.untyped_storage(), self.owner.link.to_device(self.host, target)

    def fetch(self) -> torch.UntypedStorage:
        """Have it on the device."""
        storage = self.on_device() if self.on_device is not None and self._coming is None else None
        if storage is not None:
            storage._fix_weakref()  # type: ignore[attr-defined]
        else:
            self.start()
            assert self._coming is not None
            storage, copy = self._coming
            copy.order()
            self._coming, self.on_device = None, weakref.ref(storage)
        return storage

    def __del__(self) -> None:
        # In whatever thread: a copy that nobody waits for keeps its memory until it has ended (Link sees to that).
        self.owner.ledger.drop(self.host, STATE)
