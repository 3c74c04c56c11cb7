"""The forward of a model: which units are gathered when, and what is left for backward to find.

::

    unit i:  wait gather(i) · start gather(i+1) · compute · release(i)

The order of units is learned from the last pass, with and without gradients apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from shardwise import events
from shardwise.comm.faults import Tracker
from shardwise.engine.joined import LOOK_AHEAD, first_message, start_gathers
from shardwise.engine.mixed_precision import autocast_dtype, cast_inputs, param_dtype
from shardwise.engine.passes import Call, Passes, UnitOrder
from shardwise.engine.residency import Pin, Residency
from shardwise.engine.saved_tensors import SavedTensors
from shardwise.engine.unit import Unit
from shardwise.trees import map_tensors, tensors_in

Hook = Callable[[Unit, Call, int], None]
"""What to call when the gradient of one of a call's outputs is there, with autograd's sequence number of the output."""


class _Running(NamedTuple):
    """A unit that computes: its call, if autograd records it, and the autocast that began with it."""

    unit: Unit
    call: Call | None
    autocast: torch.autocast | None


class Forward:
    """The forwards of one model.

    Args:
        root: the root module.
        passes: what is under way.
        tracker: what this rank is doing, for reports.
        ahead: units that are brought ahead of the one that computes.
        begins: called when the gradient of a call's output arrives.

    Attributes:
        units: all of them, in the order of registration; the root's own comes last. ``going``: those whose values
            come and go.
        training, evaluation: the order units came in.
        stay_gathered: units that are not released between forward and backward.
        gather_log: a checksum of the gathers of this step, which ranks compare.
        saved: what autograd saves.
        repeats: called with a number when a part of the model begins to run by itself (0: all of it), of a model that
            runs again and again, as one that writes a text word by word. Behind the last unit the first ones are
            brought from their home again.
        room: bytes of each device for all units that come and go, those that compute included: as many of the next ones
            are brought from their home as it holds. ``None``: no limit but ``ahead``.
        starts: called when a pass begins, of a root without a forward of its own: when a part that a script calls has
            come in the last one already.
    """

    def __init__(self, root: nn.Module, passes: Passes, tracker: Tracker, ahead: int, begins: Hook) -> None:
        self.root, self.passes, self.tracker, self.ahead, self.begins = root, passes, tracker, ahead, begins
        self.units: list[Unit] = []
        self.going: list[Unit] = []
        self.training, self.evaluation = UnitOrder(), UnitOrder()
        self.stay_gathered: list[Unit] = []
        self.gather_log = 0
        self.saved: SavedTensors | None = None
        self.repeats: Callable[[int], None] | None = None
        self.room: Mapping[torch.device, int] | None = None
        self.starts: Callable[[], None] | None = None
        self._running: list[_Running] = []  # outermost first
        self._parents: dict[int, Call] = {}  # per unit (by index), what its last forward was inside of
        self._hooks: list[AbstractContextManager[Any]] = []  # entered
        self._after_update: list[Unit] = []  # to be gathered once the unit before them computes

    @property
    def calls(self) -> Iterable[Call]:
        """The calls under way, outermost first."""
        return (running.call for running in self._running if running.call is not None)

    def take_over(self, units: Sequence[Unit]) -> None:
        """The model has these units."""
        self.units = list(units)
        self.going = [unit for unit in self.units if unit.released]
        self.choose_what_stays()

    # --- a pass ------------------------------------------------------------------------------------
    def begin(self) -> None:
        """The root module is about to run."""
        if not self.passes.backward:
            # Of a model that repeats, the first pass is worth looking ahead in: its units are read from files.
            self._order().begin(None if self.repeats is None else [*self.units[-1:], *self.units[:-1]])
            self.choose_what_stays()

    def _open(self, unit: Unit) -> None:
        self.passes.forward += 1
        if self.passes.forward == 1 and self.starts is not None and not self.passes.backward:
            now = self._order().now
            if not now or unit in now:
                self.starts()
        if self.passes.forward == 1 and self.repeats is not None:
            self.repeats(0 if unit.module is self.root else unit.index + 1)
        if self.passes.forward == 1 and self.saved is not None and torch.is_grad_enabled():
            hooks = self.saved.hooks()
            hooks.__enter__()
            self._hooks.append(hooks)

    def _close(self, *, failed: bool = False) -> None:
        self.passes.forward -= 1
        if self.passes.forward:
            return
        while self._hooks:
            self._hooks.pop().__exit__(None, None, None)
        self._after_update.clear()
        self.drop(Pin.FORWARD, staged=failed or self.repeats is None)
        for unit in self.going:
            unit.watch()
        if not failed:  # where it was is what the report of a failure says
            self.tracker.phase = self.tracker.unit = ""
            if self.repeats is not None:
                self._stage(self._order().now)

    def drop(self, reason: Pin, *, staged: bool = True) -> None:
        """Nothing needs the units that were kept gathered for ``reason`` any more, nor those that are ``staged``."""
        for unit in self.going:
            if unit.residence.pinned(reason) or (staged and unit.residence.staging):
                unit.residence.drop(reason)
                unit.release()
            unit.free()

    def _order(self) -> UnitOrder:
        return self.training if torch.is_grad_enabled() else self.evaluation

    def choose_what_stays(self) -> None:
        """Units that are not released between forward and backward: the root's own, and the last two.

        Backward begins with the last one and gathers the one before it ahead, so keeping both costs nothing.
        Before the first forward has shown its order, that of registration is as good a guess as any.
        """
        if not self.going:
            return
        order = self.training.last or self.units
        below = [u for u in order if u.module is not self.root]
        self.stay_gathered = [u for u in self.units if u.module is self.root] + below[-2:]

    # --- one unit ------------------------------------------------------------------------------------
    def enter(self, unit: Unit, args: Any, kwargs: Any) -> Any:
        """``unit`` is about to compute. Returns new ``(args, kwargs)``, or ``None`` to leave them."""
        self._open(unit)
        parent = None
        for running in reversed(self._running):
            if running.call is not None:
                parent = running.call
                break
        if parent is None and self.passes.backward:  # recomputed by itself, of a forward that was inside of another
            parent = self._parents.get(unit.index)
        elif parent is not None:
            self._parents[unit.index] = parent
        call = Call(unit, parent) if torch.is_grad_enabled() else None
        self._running.append(_Running(unit, call, self._autocast(unit) if unit.strategy.autocast else None))
        self.tracker.phase, self.tracker.unit = "forward", unit.label
        if events.listeners:
            events.phase("forward", unit.label)
        if self.passes.backward:  # recomputing under activation checkpointing
            unit.gather()
        else:
            following = self._order().after(unit, LOOK_AHEAD) if self.going else ()
            self._log(unit)
            self._make_room(unit)
            unit.gather()
            if following or self.repeats is not None:
                self.prefetch(following)
            if call is not None:
                unit.calls_made += 1
        if unit.strategy.param_dtype is None:
            return None
        dtype = param_dtype(unit.strategy)
        if dtype is None or unit.strategy.autocast or not any(b.dtype.is_floating_point for b in unit.buckets):
            return None
        return cast_inputs(dtype, args, kwargs)

    def _autocast(self, unit: Unit) -> torch.autocast | None:
        """Begin to run under autocast, unless that is so already.

        Inside of a unit that does, what its script switched off stays off; and torch itself brings back for a
        recomputation what was on. Nothing is cached: parameters are in that dtype as they are.
        """
        dtype = autocast_dtype(unit.strategy)
        if dtype is None:
            return None
        around = next((r.autocast.fast_dtype for r in reversed(self._running) if r.autocast is not None), None)
        device = next((b.device for u in self.units for b in u.buckets), None)
        if dtype is around or device is None or self.passes.backward:
            return None
        region = torch.autocast(device.type, dtype, cache_enabled=False)
        region.__enter__()
        return region

    def leave(self, unit: Unit, output: Any, *, failed: bool = False) -> Any:
        """``unit`` has computed, or ``failed`` to. Returns a new output, or ``None`` to leave it."""
        if not self._running or self._running[-1].unit is not unit:
            return None  # it failed before it had begun
        _, call, autocast = self._running.pop()
        if events.listeners:
            self._tell()
        if autocast is not None:
            autocast.__exit__(None, None, None)
        if failed:
            self._close(failed=True)
            return None
        try:
            changed, will_backward = None, False
            if call is not None:
                will_backward = self._hook_outputs(call, output)
            if unit.released and unit.here:
                changed = self._without_aliases(unit, output)
            if not self.passes.backward:
                if self._after_update:
                    following, self._after_update = self._after_update, []
                    following[0].finish_update()
                    self.prefetch(following)
                if not (will_backward and unit in self.stay_gathered):
                    unit.release()
                elif unit.released:
                    unit.take_writes()
            return changed
        finally:
            self._close()

    def _tell(self) -> None:
        """Tell those who listen whose forward goes on now."""
        if self._running:
            events.phase("forward", self._running[-1].unit.label)
        else:
            events.phase(*(("backward", self.tracker.unit) if self.passes.backward else ("", "")))

    def _hook_outputs(self, call: Call, output: Any) -> bool:
        """Hear of the first gradient of what ``call`` computed. Is there anything that can get one?"""
        found = False
        for t in (output,) if isinstance(output, torch.Tensor) else tensors_in(output):
            node = t.grad_fn if t.requires_grad and (t.is_floating_point() or t.is_complex()) else None
            # What passed through unchanged was computed by somebody else, and its gradient comes at another time.
            if node is not None and node._sequence_nr() >= call.since:
                t.register_hook(_Arrives(self.begins, call, node._sequence_nr()))
                found = True
        return found

    def _without_aliases(self, unit: Unit, output: Any) -> Any:
        """What is a view of values that are about to be released is copied, so that it stays what it is."""
        keys = {b.flat.key for b in unit.buckets if b.placement.released}

        def alias(t: torch.Tensor) -> bool:
            return t.layout is torch.strided and t.untyped_storage()._cdata in keys

        if not any(alias(t) for t in tensors_in(output)):
            return None
        return map_tensors(output, lambda t: t.clone() if alias(t) else t)

    def prefetch(self, following: Sequence[Unit]) -> None:
        """Gather the next unit, with what is small behind it, and bring shards of those after it from their home.

        Args:
            following: the units expected next, in their order.
        """
        if following and following[0].updating:
            self._after_update = list(following)  # once this unit has been told to compute: waiting now hides nothing
            return
        first = following[0] if following else None
        if first is not None and first.released and not first.residence.coming:
            self._make_room(first)
            start_gathers(first_message(following))
        self._stage(following)

    def _stage(self, following: Sequence[Unit]) -> None:
        """Begin to bring what the next units have at home, in their order."""
        if self.repeats is not None:
            following = [*following, *self._order().last[:LOOK_AHEAD]]
        left, begun = dict[torch.device, int](), 0
        for unit in following:
            if self.room is not None and unit.residence.state is Residency.RELEASED:
                at = unit.device
                left[at] = left.get(at, self._left(at)) - unit.gather_bytes  # also of those that come from other ranks
                if left[at] < 0:
                    break
            if unit.offloaded:
                unit.stage()
                begun += 1
                if begun == self.ahead:
                    break

    def follow(self, unit: Unit) -> None:
        """``unit`` is gathered for other ranks: bring what they need next."""
        self._stage(self._order().expected(unit, LOOK_AHEAD))

    def _left(self, at: torch.device) -> int:
        """Bytes of a device that no unit has which is here or on its way."""
        here = (u for u in self.going if u.device == at and (u.residence.coming or u.residence.staging))
        return (self.room or {}).get(at, 0) - sum(u.gather_bytes for u in here)

    def _make_room(self, unit: Unit) -> None:
        """Before a unit that was not expected: let go of what was brought in vain, if there is no room for both.

        Not of what other ranks have sent: they would have to send it once more.
        """
        if self.room is None or not unit.released or unit.residence.coming or unit.residence.staging:
            return
        over = unit.gather_bytes - self._left(unit.device)
        running = [r.unit for r in self._running]
        for other in (u for u in self.going if u.device == unit.device):
            here = other.residence.coming and other.mesh.shard.size == 1 and other not in running
            if over > 0 and (other.residence.staging or here):
                other.release()
                over -= other.gather_bytes if other.residence.state is Residency.RELEASED else 0

    def _log(self, unit: Unit) -> None:
        if unit.released and unit.mesh.shard.size > 1 and not unit.residence.coming:
            self.gather_log = zlib.crc32(unit.name.encode(), self.gather_log)


class _Arrives:
    """A tensor hook that says which call's output it is on."""

    __slots__ = ("begins", "call", "number")

    def __init__(self, begins: Hook, call: Call, number: int) -> None:
        self.begins, self.call, self.number = begins, call, number

    def __call__(self, grad: torch.Tensor) -> None:
        self.begins(self.call.unit, self.call, self.number)
