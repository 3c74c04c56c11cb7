"""Hears and sees all that a step without values does: operations, transfers, and every live byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from shardwise.events import Listener
from shardwise.observe.live import Live, LiveBytes
from shardwise.plan.calls import Call
from shardwise.plan.trace import OP, PHASE, RECOMPUTE, START, WAIT, Entry, Operation
from shardwise.tiers import Ledger

CACHE = 24 << 20
"""Bytes that a cache of a CPU holds; what was touched longer ago comes from memory."""
_TOUCH_NOTHING = (
    "set_", "_unsafe_view", "resize_", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"
)  # fmt: skip
_DEVICE = torch.ops.prim.device.default
_NUMBER = torch.ops.aten._local_scalar_dense.default


@dataclass
class Segment:
    """What is between two turns to another phase or unit.

    Attributes:
        phase, unit: see :class:`shardwise.events.Listener`.
        peak, host_peak: live bytes at the moment when most were live on the device, and on the host.
        after: the operator after which the most were.
    """

    phase: str
    unit: str
    peak: Live
    host_peak: Live
    after: str = ""


class Recorder(LiveBytes, Listener):
    """Records inside of ``with``; enter it inside of ``FakeTensorMode``.

    Args:
        ledger: counts model states of the engine that runs.
        device: the planned one. Tensors elsewhere are the host's.
        operations: note entries, not live bytes alone.

    Attributes:
        entries: see :class:`shardwise.plan.trace.Trace`.
        segments: in their order.
        calls: see :class:`shardwise.plan.trace.Trace`.
    """

    def __init__(self, ledger: Ledger, device: torch.device, *, operations: bool = True) -> None:
        super().__init__(ledger, device)
        self.operations = operations
        self.entries: list[Entry] = []
        self.segments: list[Segment] = []
        self._at = ("", "")
        self._most = (-1, -1)
        self._after = ""
        self._known: dict[Any, Operation] = {}
        self.calls: dict[Operation, Call] = {}
        self._touched = 0  # bytes, by all operations so far
        self._touched_at: dict[tuple[int, int], int] = {}

    # --- turns and transfers -----------------------------------------------------------------
    def phase(self, phase: str, unit: str) -> None:
        if (phase, unit) != self._at:
            self._at, self._most = (phase, unit), (-1, -1)
            self.sample()
            if self.operations:
                self.entries.append(Entry(PHASE, phase, unit))

    def start(self, way: str, name: str, nbytes: int, ranks: tuple[int, ...] = ()) -> None:
        if self.operations:
            self.entries.append(Entry(START, *self._at, way=way, name=name, nbytes=nbytes, ranks=ranks))

    def wait(self, way: str, name: str) -> None:
        if self.operations:
            self.entries.append(Entry(WAIT, *self._at, way=way, name=name))

    # --- operations --------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _NUMBER:  # a script asks for a number that nobody has: one, or true, is as good as any
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func.namespace == "prim":  # a question about a device or layout, of which every other call here is one
            asked = args[0]
            if func is _DEVICE and isinstance(asked, FakeTensor) and not asked.fake_mode.in_kernel_invocation:
                return asked.fake_device
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self._after = func._schema.name
        super().saw(func, args, kwargs, out)
        if self.operations and not func.is_view:
            op = self._operation(func, args, kwargs, out)
            if op is not None:
                again = torch.is_grad_enabled() and torch._C._current_graph_task_id() >= 0
                self.entries.append(Entry(OP, RECOMPUTE if again else self._at[0], self._at[1], op=op))

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> Operation | None:
        """``None``: a question of torch's own, about dtypes or devices, which tensors without values alone hear."""
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        if not given and not made:
            return None
        shapes = tuple(tuple(t.shape) for t in given)
        dtypes = tuple(str(t.dtype).removeprefix("torch.") for t in given)
        rest = ", ".join(
            [repr(a) for a in args if not _has_tensor(a)]
            + [f"{k}={v!r}" for k, v in kwargs.items() if not _has_tensor(v)]
        )
        strides = [t.stride() if t.layout is torch.strided and not t.is_contiguous() else () for t in given]
        if any(strides):  # of transposed ones, above all: they are read at another rate
            rest = f"{rest}; strides {strides}"
        cold = "".join("01"[self._is_cold(t)] for t in given)
        for t in (*given, *made):
            self._touch(t)
        device = "host" if any(map(self.on_host, made[:1] or given[:1])) else "device"
        key = func, shapes, dtypes, rest, device, cold
        found = self._known.get(key)
        if found is None:
            count = flop_registry.get(func._overloadpacket)
            flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
            name, read, written = func._schema.name, 0, 0
            if name.removeprefix("aten::") not in _TOUCH_NOTHING:
                read, written = sum(map(_touched, given)), sum(map(_touched, made))
            found = self._known[key] = Operation(name, shapes, dtypes, rest, device, flops, read, written, cold)
            if _can_be_made_again(args, kwargs):
                self.calls[found] = Call.of(func, args, kwargs, [c == "1" for c in cold])
        return found

    # --- what a cache holds --------------------------------------------------------------------
    def _is_cold(self, tensor: torch.Tensor) -> bool:
        """Was so much touched since this was that a cache of a CPU has lost it?"""
        last = self._touched_at.get(_place(tensor))
        return last is None or self._touched - last > CACHE

    def _touch(self, tensor: torch.Tensor) -> None:
        self._touched += _touched(tensor)
        self._touched_at[_place(tensor)] = self._touched

    # --- live bytes --------------------------------------------------------------------------
    def sample(self) -> None:
        totals, most = self.totals, self._most
        if totals[0] <= most[0] and totals[1] <= most[1]:
            return
        live = self.now()
        if most[0] < 0:
            self.segments.append(Segment(*self._at, live, live))
        segment = self.segments[-1]
        if totals[0] > most[0]:
            segment.peak, segment.after = live, self._after
        if totals[1] > most[1]:
            segment.host_peak = live
        self._most = max(totals[0], most[0]), max(totals[1], most[1])


def _can_be_made_again(args: Any, kwargs: Any) -> bool:
    """Is it told by what its tensors look like? Not of handles, which have no memory, nor of storages."""
    return not any(isinstance(x, torch.UntypedStorage) or hasattr(x, "bucket") for x in tree_iter((args, kwargs)))


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its first element is."""
    if tensor.layout is not torch.strided or hasattr(tensor, "bucket"):
        return 0, 0
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _has_tensor(value: Any) -> bool:
    return any(isinstance(item, torch.Tensor) for item in tree_iter(value))


def _touched(tensor: torch.Tensor) -> int:
    """Bytes that an operator reads or writes of it: where few are spread over a shape, those that there are."""
    nbytes = tensor.numel() * tensor.element_size()
    return nbytes if tensor.layout is not torch.strided else min(nbytes, tensor.untyped_storage().nbytes())
