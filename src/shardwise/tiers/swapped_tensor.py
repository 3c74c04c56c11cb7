"""Tensors whose bytes are on a disk between two uses, and keep their identity meanwhile.

A tensor that is *swapped out* has its shape, its dtype and a few bytes. Only its class is switched to
:class:`SwappedTensor`, whose ``__torch_function__`` stops everything that would read or write values: never a stale
number, never a crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from shardwise.errors import OffloadError
from shardwise.tiers.metadata_access import accessed
from shardwise.tiers.planned import without_values

if TYPE_CHECKING:
    from shardwise.tiers.home import StateExtent


class SwapLocation(NamedTuple):
    """Where a tensor's bytes are: ``offset`` bytes into an extent."""

    extent: StateExtent
    offset: int
    what: str


class SwappedTensor(torch.Tensor):
    """A tensor whose bytes are on the disk."""

    _shardwise_location: SwapLocation

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, metadata_only = accessed(func)
        first = args[0] if args else None
        if isinstance(first, SwappedTensor):
            if name == "is_contiguous":
                return True  # as soon as it is here
            if name == "__repr__":
                what = first._shardwise_location.what
                return f"SwappedTensor(shape={tuple(first.shape)}, dtype={first.dtype}, {what})"
        if not metadata_only:
            raise _refuse(_any((args, kwargs)), name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Any:
        raise _refuse(self, "copy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _refuse(self, "pickle")


def _any(tree: Any) -> SwappedTensor | None:
    if isinstance(tree, SwappedTensor):
        return tree
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return next((found for item in items if (found := _any(item)) is not None), None)


def _refuse(tensor: SwappedTensor | None, operation: str) -> OffloadError:
    what = "a tensor" if tensor is None else tensor._shardwise_location.what
    return OffloadError(
        f"'{operation}' on {what} while its values are on the disk",
        fix="read or change it inside 'with shardwise.optimizer_state(optimizer):', or take optimizer.state_dict()",
    )


def is_swapped(value: object) -> bool:
    """Are its bytes on the disk?"""
    return isinstance(value, SwappedTensor) or (
        isinstance(value, torch.Tensor) and "_shardwise_location" in vars(value)
    )


def swap_out(tensor: torch.Tensor, location: SwapLocation) -> None:
    """Let go of a tensor's bytes, which are (or are being written) at ``location``.

    What is left is one number, nan where there is such a thing, spread over the shape.
    """
    filler = float("nan") if tensor.dtype.is_floating_point else 0
    shape = tensor.shape
    if without_values():  # and nobody to be kept from reading them
        tensor.data = torch.full((), filler, dtype=tensor.dtype).expand(shape)
        tensor._shardwise_location = location  # type: ignore[attr-defined]
        return
    tensor.__class__ = torch.Tensor
    tensor.data = torch.full((), filler, dtype=tensor.dtype).expand(shape)
    tensor._shardwise_location = location  # type: ignore[attr-defined]
    tensor.__class__ = SwappedTensor


def swap_in(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Let a tensor be ``values``: same shape and dtype, in host memory. Nothing is copied."""
    if type(tensor) is SwappedTensor:
        tensor.__class__ = torch.Tensor  # type: ignore[assignment]
    tensor.data = values
    tensor.__dict__.pop("_shardwise_location", None)


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that is swapped out, in new host memory; a tensor that is here as it is.

    Raises:
        OffloadError: the disk could not give it back.
    """
    if not is_swapped(tensor):
        return tensor
    location: SwapLocation = tensor._shardwise_location  # type: ignore[attr-defined]
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    for transfer in location.extent.read(copy.view(-1).view(torch.uint8), location.offset):
        transfer.wait()
    return copy
