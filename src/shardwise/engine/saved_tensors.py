"""What autograd saves from flat buffers: a place, not a tensor, so that values may go and come back.

Autograd keeps what a backward will need. Where that is a view of a flat buffer whose values are released, a kernel
that reads it ends the process. Inside the forwards of a model whose values come and go, a pair of torch's
saved-tensor hooks therefore puts a :class:`SavedView` in its place: the unit, the storage's view, and the version of
the parameter. When backward asks for it, the unit is gathered, whatever path the graph took to get there: an output
that was kept, an auxiliary loss left on a module, a frozen layer fed by an attribute, a weight used detached.

What lies elsewhere is handed back as it is. Torch does not compare versions of tensors that went through hooks, so it
is done here: what was changed in place since is an error, as it is without hooks.

Cost: about 2 µs per saved tensor in forward and 2 µs in backward (``benchmarks/saved_tensors.py``); nothing under
``ddp``, ``zero1`` and ``zero2``, whose values stay. Instead, nothing is kept gathered from forward to backward because
somebody might still need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from shardwise.engine.bucket import Bucket
from shardwise.engine.passes import Call
from shardwise.engine.unit import Unit
from shardwise.errors import GradientError
from shardwise.tiers.planned import is_plain

_PLAIN = (torch.Tensor, nn.Parameter)


class SavedView:
    """A view of a flat buffer that autograd saved."""

    __slots__ = ("bucket", "call", "dtype", "index", "offset", "owner", "size", "stride", "unit", "version")

    def __init__(
        self, owner: SavedTensors, unit: Unit, bucket: Bucket, tensor: torch.Tensor, call: Call | None
    ) -> None:
        self.owner, self.unit, self.bucket, self.call = owner, unit, bucket, call
        self.dtype, self.size, self.stride = tensor.dtype, tensor.size(), tensor.stride()
        self.offset = int(tensor.storage_offset())
        self.index = bucket.slot_at(self.offset) if tensor.dtype == bucket.dtype else None
        self.version = None if self.index is None else _version(bucket.params[self.index])

    def view(self) -> torch.Tensor:
        """The tensor, whose values are here."""
        if self.index is not None and self.version != _version(self.bucket.params[self.index]):
            raise GradientError(
                f"parameter '{self.bucket.names[self.index]}' has been modified by an inplace operation (an "
                "optimizer's step, or a write) since the forward whose backward needs it",
                where=f"unit {self.unit.label}",
                fix="run the forward again before backward",
            )
        flat = self.bucket.flat.tensor
        return torch.empty(0, dtype=self.dtype, device=flat.device).set_(
            flat.untyped_storage(), self.offset, self.size, self.stride
        )


class SavedTensors:
    """The hooks of one model.

    Args:
        bring: called in backward with a unit whose values are needed, and the call they were saved in; they are here
            when it returns.
        calls: the forwards of units that are under way, outermost first.
    """

    def __init__(self, bring: Callable[[Unit, Call | None], None], calls: Callable[[], Iterable[Call]]) -> None:
        self._bring, self._calls = bring, calls
        self._flats: dict[int, tuple[Unit, Bucket]] = {}
        self._units: list[Unit] = []
        self._needed = False  # do any values come and go?

    def follow(self, units: Iterable[Unit]) -> None:
        """From here on, look for these units' flat buffers."""
        self._units = list(units)
        self._needed = any(b.placement.released for unit in self._units for b in unit.buckets)
        self._look()

    def _look(self) -> None:
        self._flats = {b.flat.key: (unit, b) for unit in self._units for b in unit.buckets if b.flat.nbytes}

    def hooks(self) -> AbstractContextManager[Any]:
        """A context manager: what autograd saves inside goes through here.

        Where the script has hooks of its own around it (a checkpoint, ``save_on_cpu``), these count: what they keep of
        a flat buffer keeps its bytes alive. Around the hooks of another model that is running, both look.
        """
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if not self._needed:
            return nullcontext()
        self._look()  # a buffer may have got another storage
        outer = None if top is None else top[0]
        if outer is not None and not isinstance(outer, _Pack):
            return nullcontext()
        return saved_tensors_hooks(_Pack(self, outer), _unpack)

    def flat_of(self, tensor: torch.Tensor) -> tuple[Unit, Bucket] | None:
        """The unit and bucket whose flat buffer a tensor is a view of."""
        if tensor.layout is not torch.strided:
            return None
        return self._flats.get(tensor.untyped_storage()._cdata)

    def pack_view(self, tensor: torch.Tensor) -> SavedView | None:
        """What stands for a view of a flat buffer; ``None`` if it is none."""
        if (type(tensor) not in _PLAIN and not is_plain(tensor)) or tensor.layout is not torch.strided:
            return None
        found = self._flats.get(tensor.untyped_storage()._cdata)
        if found is None or tensor.is_conj() or tensor.is_neg():
            return None  # a plain alias keeps the bytes alive
        unit, bucket = found
        inside = next((call for call in reversed(list(self._calls())) if call.unit is unit), None)
        return SavedView(self, unit, bucket, tensor, inside)

    def unpack_view(self, saved: SavedView) -> torch.Tensor:
        """Have the unit's values here and return the view."""
        if not saved.unit.here:
            self._bring(saved.unit, saved.call)
        return saved.view()


class _Pack:
    """What autograd calls with a tensor to save.

    Args:
        saved: whose model is running.
        around: of the model whose forward that is a part of.
    """

    __slots__ = ("around", "saved")

    def __init__(self, saved: SavedTensors, around: _Pack | None) -> None:
        self.saved, self.around = saved, around

    def __call__(self, tensor: torch.Tensor) -> Any:
        at: _Pack | None = self
        while at is not None:
            view = at.saved.pack_view(tensor)
            if view is not None:
                return view
            at = at.around
        plain = tensor.detach()  # what is returned is held by the node that made the tensor: no circle
        return plain, plain._version


def _unpack(packed: Any) -> torch.Tensor:
    if type(packed) is SavedView:
        return packed.owner.unpack_view(packed)
    tensor, version = packed
    if tensor._version != version:
        raise GradientError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}, saved at version {version}, is at version "
            f"{tensor._version}",
            fix="change a copy of it; torch.autograd.set_detect_anomaly(True) shows where it was saved",
        )
    return tensor


def _version(param: nn.Parameter) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return param._version
