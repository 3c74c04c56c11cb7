"""Tensors whose bytes are on a disk between two uses, and keep their identity meanwhile.

A tensor that is *away* has its shape, its dtype and a few bytes. Only its class is switched to :class:`Staged`,
whose ``__torch_function__`` stops everything that would read or write values: never a stale number, never a crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from shardwise.errors import OffloadError
from shardwise.tiers.harmless import asked

if TYPE_CHECKING:
    from shardwise.tiers.home import Shelf


class Place(NamedTuple):
    """Where a tensor's bytes are: ``offset`` bytes into a shelf."""

    shelf: Shelf
    offset: int
    what: str


class Staged(torch.Tensor):
    """A tensor whose bytes are away."""

    _shardwise_place: Place

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, harmless = asked(func)
        first = args[0] if args else None
        if isinstance(first, Staged):
            if name == "is_contiguous":
                return True  # as soon as it is here
            if name == "__repr__":
                return f"Staged(shape={tuple(first.shape)}, dtype={first.dtype}, {first._shardwise_place.what})"
        if not harmless:
            raise _refuse(_any((args, kwargs)), name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Any:
        raise _refuse(self, "copy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _refuse(self, "pickle")


def _any(tree: Any) -> Staged | None:
    if isinstance(tree, Staged):
        return tree
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return next((found for item in items if (found := _any(item)) is not None), None)


def _refuse(tensor: Staged | None, operation: str) -> OffloadError:
    what = "a tensor" if tensor is None else tensor._shardwise_place.what
    return OffloadError(
        f"'{operation}' on {what} while its values are on the disk",
        fix="read or change it inside 'with shardwise.optimizer_state(optimizer):', or take optimizer.state_dict()",
    )


def send_away(tensor: torch.Tensor, place: Place) -> None:
    """Let go of a tensor's bytes, which are (or are being written) at ``place``.

    What is left is one number, nan where there is such a thing, spread over the shape.
    """
    filler = float("nan") if tensor.dtype.is_floating_point else 0
    shape = tensor.shape
    tensor.__class__ = torch.Tensor
    tensor.data = torch.full((), filler, dtype=tensor.dtype).expand(shape)
    tensor._shardwise_place = place  # type: ignore[attr-defined]
    tensor.__class__ = Staged


def bring(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Let a tensor be ``values``: same shape and dtype, in host memory. Nothing is copied."""
    tensor.__class__ = torch.Tensor
    tensor.data = values
    tensor.__dict__.pop("_shardwise_place", None)


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that is away, in new host memory; a tensor that is here as it is.

    Raises:
        OffloadError: the disk could not give it back.
    """
    if not isinstance(tensor, Staged):
        return tensor
    place = tensor._shardwise_place
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    for transfer in place.shelf.read(copy.view(-1).view(torch.uint8), place.offset):
        transfer.wait()
    return copy
