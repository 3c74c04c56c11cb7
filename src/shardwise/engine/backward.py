"""The backward of a model: when units are gathered and released, and when their gradients are reduced.

::

    unit i:           wait gather(i) · start gather(i-1) · compute, gradients copied as they arrive, or left in p.grad
    unit i-1 begins:  release(i) · finish reduce(i+1) · start reduce(i)
    the end:          reduce what is left · control exchange · show gradients in p.grad

**When a unit's backward is over** does not depend on which gradients arrived: an expert that was idle on one rank gets
none there. Autograd runs the nodes of a graph in the reverse of the order in which they were made. So when the first
gradient of one call's outputs is there, every call that came after it in the forward is over, with all gradients that
it will ever make; those it is inside of are not. All ranks run the same calls, so they all see the same units over at
the same moment, and issue their gathers and reduces in one order, over all communicators of a device.

**The order of reduces** is one that all ranks share: first the reverse of registration, later the order in which rank
0's units were done in the last backward. A unit that is over early waits for its turn. What was reduced last time, on
any rank, is reduced now, with zeros where nothing arrived.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from operator import is_, is_not
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from shardwise import events
from shardwise.comm import joined
from shardwise.comm.faults import Tracker
from shardwise.comm.mesh import Mesh
from shardwise.comm.stats import Op
from shardwise.engine.batch import Batch
from shardwise.engine.commands import Command
from shardwise.engine.control import Agreed, Exchange
from shardwise.engine.forward import Forward
from shardwise.engine.grad_states import GradState
from shardwise.engine.gradients import Gradients
from shardwise.engine.gradmask import mask
from shardwise.engine.in_backward import InBackward
from shardwise.engine.joined import LOOK_AHEAD, Reduces, by_bytes
from shardwise.engine.listening import Listening
from shardwise.engine.own_gradients import OwnGradients
from shardwise.engine.passes import Call, Passes, UnitOrder
from shardwise.engine.residency import Pin
from shardwise.engine.unit import Slot, Unit, Upward, are_here
from shardwise.errors import UnitError

_IN_FLIGHT = 1  # messages of reduces under way while the next unit computes; each holds its gradients twice


class _Run:
    """One backward, from its first sign to its end.

    Attributes:
        open: calls whose backward has begun and is not over.
        over: per unit (by index), how many of its calls are over.
        expected: per unit, how many calls it made since the last backward.
        entered: units (by index) that have begun.
        done: units (by index) that are over, in that order.
        next: position in the common order of reduces.
        launched: units whose turn to be reduced has come.
        waiting: of them, those that go with the next message; ``waiting_bytes``: of gradients.
        in_flight: messages that were sent and not finished: their units, and what was taken in batches.
        arrived: parameters (by ``id``) that got a gradient here, or whose gradient waits here for its reduce.
        had: parameters (by ``id``) that had a gradient before. ``p.grad`` shows it all the time: a script that catches
            an exception may clear it before autograd has let go of the backward.
        hidden: of them, those that autograd is about to give another one, with what ``p.grad`` showed.
        keep_graph: ``create_graph=True``: a second backward needs the values.
        begun: ``had`` is known. ``leaves``: there was no gradient, and no unit's values go: what arrives is left in
            ``p.grad`` until its message goes.
        batches: messages of gradients that were taken from there; ``apart``: units that were launched otherwise.
    """

    def __init__(self, units: Sequence[Unit], keep_graph: bool) -> None:
        self.open: list[Call] = []
        self.over: dict[int, int] = {}
        self.expected = [unit.calls_made for unit in units]
        self.entered: set[int] = set()
        self.done: dict[int, None] = {}
        self.next = 0
        self.launched: list[Unit] = []
        self.waiting: list[Unit] = []
        self.waiting_bytes = 0
        self.in_flight: deque[tuple[list[Unit], list[Batch]]] = deque()
        self.arrived: set[int] = set()
        self.had: set[int] = set()
        self.hidden: dict[int, torch.Tensor] = {}
        self.keep_graph = keep_graph
        self.begun = self.leaves = False
        self.batches: list[Batch] = []
        self.apart: list[Unit] = []


class Backward:
    """The backwards of one model.

    Args:
        mesh: its ranks.
        passes: what is under way.
        tracker: what this rank is doing, for reports.
        forward: the forwards of the same model.
        upward: announces what needs all ranks.
        control: names the exchange that ends a backward.
        settings: what ranks without data do not know yet of the optimizers that this backward will step.
        leader: the rank whose order of units counts.

    Attributes:
        units: all of them, in the order of registration. ``moving``: those that are not settled.
        sync: ``False`` inside ``no_sync()``: gradients stay on this rank.
        local: inside LocalSGD: every rank steps on gradients of its own.
        count: backwards that have begun.
        order: units (by index) expected to be reduced, in the common order.
        in_backward: updates units as soon as their gradients are reduced; ``None``: ``step()`` does.
        listening: whose backwards are noticed one by one; ``None``: nobody's yet.
        alert: see :class:`~shardwise.engine.unit.Listener`.
    """

    def __init__(
        self,
        mesh: Mesh,
        passes: Passes,
        tracker: Tracker,
        forward: Forward,
        upward: Upward,
        control: Op,
        settings: Callable[[], dict[int, Any]],
        leader: Callable[[], int],
    ) -> None:
        self.mesh, self.passes, self.tracker, self.forward, self.upward = mesh, passes, tracker, forward, upward
        self._control, self._settings, self._leader = control, settings, leader
        self.units: list[Unit] = []
        self.moving: list[Unit] = []
        self._own: list[OwnGradients] = []
        self._own_params: list[nn.Parameter] = []
        self._counted: list[bool] = []  # which of those had one when the ledger was told last
        self._params: list[int] = []  # of those that move, by ``id``
        self._grads: list[Gradients] = []  # theirs
        self._all: list[nn.Parameter] = []
        self.listening: Listening | None = None
        self.sync, self.local = True, False
        self.count = self.reduced = 0
        self.order: list[int] = []
        self.seen_order = UnitOrder()
        self.in_backward: InBackward | None = None
        self._reduces = Reduces()
        self._run: _Run | None = None
        self.alert = True
        self._lost = False  # the last backward ended in an exception
        self._token: weakref.ref[Any] | None = None

    def take_over(self, units: Sequence[Unit]) -> None:
        """The model has these units."""
        self.units = list(units)
        self.moving = [unit for unit in self.units if not unit.settled]
        self._own = [b.grads for u in self.units for b in u.buckets if isinstance(b.grads, OwnGradients)]
        self._own_params = [p for grads in self._own for p in grads.bucket.params]
        self._params = [key for unit in self.moving for key in unit.places]
        small = [b for unit in self.moving for b in unit.buckets if b.wire_bytes < joined.JOINED_BYTES]
        for b in small:
            b.grads.packed = self.mesh.parts > 1 and len(small) > 1
        self._grads = [b.grads for unit in self.moving for b in unit.buckets]
        self._all = [p for grads in self._grads for p in grads.bucket.params]
        # Until a backward has shown better: the reverse of registration, with parents after their children.
        self.order = self.default_order()
        for unit in self.units:
            unit.listener = self
            for slot in unit.slots:
                if not slot.bucket.placement.settled and slot not in unit.unwatched:
                    self._tell(slot)  # of a child that was sharded before
            self.watch(unit)

    def listen(self, hear: Callable[[Unit], None]) -> None:
        """The units' modules know them: from here on, those run that have to be noticed.

        Args:
            hear: puts the hooks on the module of a unit.
        """
        self.listening = Listening(hear)
        in_order = [self.units[i] for i in self.order]
        alone = self.in_backward is not None or any(unit.released for unit in self.units)
        messages = [[unit] for unit in in_order] if alone else by_bytes(in_order, lambda unit: unit.wire_bytes)
        others = [u for u in self.units if (not u.settled and u not in in_order) or u.module is self.forward.root]
        self.listening.choose(messages, others, self.forward.root)

    def listen_as(self, of: Backward) -> None:
        """As the original of this model does."""
        if of.listening is not None:
            self.listen(of.listening.hear_one)

    def default_order(self) -> list[int]:
        depth = {u.index: (u.name.count(".") + 1 if u.name else 0) for u in self.units}
        live = [u.index for u in self.moving if any(p.requires_grad for p in u.params)]
        return sorted(live, key=lambda i: (depth[i] == 0, -i))

    # --- arrivals ------------------------------------------------------------------------------------
    def watch(self, unit: Unit) -> None:
        """Hear of the gradients of a unit's parameters, also those unfrozen since the last look."""
        if not unit.unwatched:
            return
        for slot in unit.unwatched:
            if slot.param.requires_grad:
                slot.watch()
                self._tell(slot)
        unit.unwatched = [slot for slot in unit.unwatched if not slot.param.requires_grad]

    def _tell(self, slot: Slot) -> None:
        """Gradients that are not packed from where autograd made them are taken as they arrive."""
        if self.in_backward is not None or not slot.bucket.grads.packed:
            slot.tell()

    def expect(self, slot: Slot) -> None:
        """Autograd is about to add a gradient to what ``p.grad`` shows: that has to be hidden meanwhile."""
        if self._run is None or self._lost:
            self.begin()
        run = self._run
        if run is not None and run.had and slot.param.grad is not None:
            run.hidden[id(slot.param)] = slot.param.grad
            slot.param.grad = None
            slot.tell()

    def arrived(self, slot: Slot) -> None:
        """It has come: take it, and show what ``p.grad`` showed."""
        run, param = self._run, slot.param
        grad = param.grad
        param.grad = run.hidden.pop(id(param), None) if run is not None and run.hidden else None
        if run is None or grad is None:
            return
        if self.in_backward is not None:
            self.in_backward.refuse_more(slot.unit, slot.bucket.names[slot.index])
        run.arrived.add(id(param))
        slot.bucket.grads.take_one(slot.index, grad, detach=run.keep_graph)

    def _collect(self, run: _Run, unit: Unit) -> None:
        """Take what autograd has left in ``p.grad``, of gradients that are packed from where they are."""
        for b in unit.buckets:
            if b.grads.packed:
                run.arrived.update(b.grads.collect_own(run.had, detach=run.keep_graph))

    def _collect_all(self, run: _Run) -> bool:
        """What autograd has left anywhere. Was there any?"""
        with torch._C.DisableTorchFunctionSubclass():  # of parameters that are released
            if not run.had and all(map(is_, [p.grad for p in self._all], repeat(None))):
                return False
        for unit in self.moving:
            self._collect(run, unit)
        return True

    # --- the beginning ---------------------------------------------------------------------------------
    def begin(self) -> None:
        """First sign of a backward: arrange to be called when autograd has finished it."""
        if self._lost:
            self.abandon()
        if self._run is not None:
            return
        if self.sync:
            with self.upward.announce(Command.BACKWARD, partial(mask, self.units), self._settings):
                pass
        keep_graph = torch.is_grad_enabled()
        if self.in_backward is not None:
            for what, wrong in (("create_graph=True", keep_graph), ("LocalSGD", self.local)):
                if wrong:
                    raise UnitError(f"optimizer_in_backward does not work with {what}", fix="leave one of them out")
        try:
            self.start(keep_graph)
        except BaseException:
            self.lost()
            raise
        self.seen_order.begin(self.forward.training.now[::-1])
        end = _End(self)
        # Autograd lets go of it without a call where the backward ends in an exception.
        self._token = weakref.ref(end, partial(_lost, weakref.ref(self)))
        Variable._execution_engine.queue_callback(end)

    def start(self, keep_graph: bool = False) -> None:
        """Nothing has arrived yet and nothing is launched."""
        for unit in self._unsettled():
            unit.finish_update()
        self.passes.backward = True
        self.count += 1
        run = self._run = _Run(self.units, keep_graph)
        if self.in_backward is not None:
            self.in_backward.begin(self.units)
        with torch._C.DisableTorchFunctionSubclass():  # of parameters that are released
            if all(map(is_, [p.grad for p in self._all], repeat(None))):
                for grads in self._grads:
                    grads.forget_zeroed()
                run.begun, self.alert = True, False
                run.leaves = not self.forward.going and self.in_backward is None
                return
        for grads in self._grads:
            had = grads.read_flags()
            if any(had):
                run.had.update(id(p) for p, was in zip(grads.bucket.params, had, strict=True) if was)
            if grads.states.any_waits:  # what no_sync() has kept on this rank is reduced with what arrives now
                run.arrived.update(id(p) for i, p in enumerate(grads.bucket.params) if grads.states.waits(i))
        run.begun, self.alert = True, bool(run.had)

    def _unsettled(self) -> list[Unit]:
        """Units that an update may be changing, or one has failed to change."""
        if are_here(self.moving):
            return []
        return [unit for unit in self.moving if unit.updating or unit.failure is not None]

    # --- unit by unit ------------------------------------------------------------------------------------
    def enter(self, unit: Unit, call: Call | None, number: int | None = None) -> None:
        """The backward of ``unit`` begins: the gradient of an output of ``call`` is here, or what it saved is needed.

        Args:
            number: autograd's sequence number of that output.
        """
        self.begin()
        run = self._run
        assert run is not None
        if call is not None:
            self._see_over(run, call, number)
        self._launch_next(run)
        self.tracker.phase, self.tracker.unit = "backward", self._label(unit)
        if events.listeners:
            events.phase("backward", unit.label)
        if unit.index not in run.entered or not unit.here:
            run.entered.add(unit.index)
            if self.forward.going:
                following = self.seen_order.after(unit, LOOK_AHEAD)
                unit.gather()
                self.forward.prefetch(following)
            if run.keep_graph and unit.released:
                unit.residence.pin(Pin.BACKWARD)
        if call is not None and call not in run.open:
            run.open.append(call)

    def _label(self, unit: Unit) -> str:
        return unit.label if self.listening is None else self.listening.label(unit)

    def bring(self, unit: Unit, call: Call | None) -> None:
        """Something that autograd saved of ``unit``'s values is needed now.

        Raises:
            UnitError: it is not a backward that asks.
        """
        if torch._C._current_graph_task_id() == -1:
            raise UnitError(
                "a tensor that autograd saved is read outside of a backward, while its values are released",
                where=f"unit {unit.label}",
                fix="read it inside 'with shardwise.gathered(module):'",
            )
        self.enter(unit, call)
        unit.gather()

    def _see_over(self, run: _Run, now: Call, number: int | None) -> None:
        """The backward of ``now`` begins: what came after it in the forward is over."""
        if not run.open or run.open[-1] is now:
            return
        if len(run.open) == 1 and run.open[0] is now.parent and now.parent.parent is None:
            return  # the root's, which this is inside of
        around = list(now.around())
        for call in [c for c in run.open if c not in around]:
            if number is not None and number >= call.since and now in call.around():
                continue  # its output is returned by the one that it is inside of, and has this gradient, too
            run.open.remove(call)
            index = call.unit.index
            run.over[index] = run.over.get(index, 0) + 1
            if run.over[index] >= run.expected[index]:
                self._is_done(run, call.unit)

    def _is_done(self, run: _Run, unit: Unit) -> None:
        if not run.leaves:
            self._collect(run, unit)
        unit.release()
        run.done[unit.index] = None
        silent = () if self.listening is None else self.listening.silent.get(unit.index, ())
        run.done.update(dict.fromkeys([other.index for other in silent]))

    def _launch_next(self, run: _Run) -> None:
        """Start the reduces of units that are done, in the common order."""
        order = self.order
        while run.next < len(order) and order[run.next] in run.done and self.sync:
            run.next += 1
            self.launch(self.units[order[run.next - 1]])

    def launch(self, unit: Unit) -> None:
        """It is the turn of a unit to be reduced: with the next message, which goes when it is long enough."""
        with self.upward.announce(Command.REDUCE, unit.index):
            run = self._run
            assert run is not None
            nbytes = unit.wire_bytes
            if run.waiting_bytes + nbytes > joined.JOINED_BYTES:
                self._send(run)
            run.launched.append(unit)
            run.waiting.append(unit)
            run.waiting_bytes += nbytes
            if run.waiting_bytes >= joined.JOINED_BYTES or self.in_backward is not None:
                self._send(run)  # an update in the backward frees gradients as soon as it can

    def _send(self, run: _Run) -> None:
        """Start the reduces that wait, and finish those before."""
        if not run.waiting:
            return
        units, run.waiting, run.waiting_bytes = run.waiting, [], 0
        with torch.no_grad():
            while len(run.in_flight) >= _IN_FLIGHT:
                self._finish(*run.in_flight.popleft())
            batches = self._reduces.take(units) if run.leaves else None
            if batches is not None:
                run.batches += batches
                for batch in batches:
                    run.arrived.update(batch.ids)
            else:
                for unit in units:
                    self._collect(run, unit)
                run.apart += units
                self._reduces.start(units)
        run.in_flight.append((units, batches or []))

    def follow_launch(self, unit: Unit) -> None:
        """On a rank without data: the others start the reduce of ``unit``."""
        assert self._run is not None
        self._run.next += 1  # the order is the same on all ranks
        self.launch(unit)

    def _finish(self, units: Sequence[Unit], batches: Sequence[Batch]) -> None:
        for batch in batches:
            if batch.split:
                batch.finish()
            else:
                batch.advance()
        for unit in () if batches else units:
            for b in unit.buckets:
                if b.grads.split or self.in_backward is not None:
                    b.grads.finish_reduce()
                else:
                    b.grads.advance_reduce()
            if self.in_backward is not None and self._run is not None:
                self.in_backward.update(unit, self._run.arrived)

    # --- the end -----------------------------------------------------------------------------------------
    def end(self, gather_log: int | None = None) -> None:
        """Autograd is done: reduce what is left, agree on what got gradients, show them in ``p.grad``.

        Args:
            gather_log: of the ranks with data, on a rank without.
        """
        run = self._run
        assert run is not None
        self.tracker.phase = "the end of backward"
        if events.listeners:
            events.phase("end of backward", self.tracker.unit)
        try:
            if self.moving and (not run.leaves or not (self.sync or gather_log is not None)):
                self._collect_all(run)
            if self.sync or gather_log is not None:
                log = self.forward.gather_log if gather_log is None else gather_log
                with torch.no_grad(), self.upward.announce(Command.BACKWARD_ENDS, log):
                    agreed = self._reduce_rest(run, log)
                    self.reduced += bool(self.moving)
                    self._show(agreed.used | run.had)
                    if self.in_backward is not None:
                        self.in_backward.end(self.units)
            else:
                self._show(run.arrived | run.had)
                if self.local or self.mesh.parts == 1:
                    self._keep()
            if not run.keep_graph:
                self.forward.drop(Pin.BACKWARD)
                for unit in self.forward.going:
                    unit.release()
            self._run = None
        finally:
            self._lost, self.alert = self._run is not None, True
            self.passes.backward = False
            self.tracker.phase = self.tracker.unit = ""
            if events.listeners:
                events.phase("", "")
            for unit in self.units:
                unit.calls_made = 0
            for unit in self.forward.going:
                unit.watch()
            self.count_gradients()

    def count_gradients(self) -> None:
        """Tell the ledger of gradients that autograd keeps by itself."""
        if not self._own:
            return
        there = list(map(is_not, [p.grad for p in self._own_params], repeat(None)))
        if there != self._counted or self._own[0].bucket.ledger.observer is not None:
            self._counted = there
            for grads in self._own:
                grads.count()

    def _reduce_rest(self, run: _Run, log: int) -> Agreed:
        if not self.moving:
            return Agreed(set(), set(), [])
        # 1. What was reduced last time, on any rank, is reduced now, with zeros where nothing arrived.
        for index in self.order[run.next :]:
            self.launch(self.units[index])
        run.next = len(self.order)
        self._send(run)
        more = self._collect_all(run) if run.leaves else True  # not reduced last time, or come behind its message
        launched = {u.index for u in run.launched}
        # 2. Which parameters got a gradient, and where more arrived after their unit's reduce?
        late: list[int] = []
        if more or run.apart:
            late = [u.index for u in self.moving if any(b.grads.states.any_waits for b in u.buckets)]
        group = None if self.mesh.world.fake else self.mesh.control
        exchange = Exchange(self._params, len(self.units), run.arrived, late, run.done, log, group, self._control)
        transfer = exchange.start()
        for batch in run.batches:
            batch.finish()
        for unit in run.apart:
            for b in unit.buckets:
                b.grads.finish_reduce()
        run.in_flight.clear()
        agreed = exchange.finish(transfer, self._leader())
        # 3. What nobody expected: units used for the first time, or a second arrival in one backward.
        wanted = {u.index for u in self.moving}
        if len(agreed.used) < len(self._params):
            wanted = {u.index for u in self.moving if not agreed.used.isdisjoint(u.places)}
        unexpected = [self.units[i] for i in sorted(agreed.again | (wanted - launched))]
        for unit in unexpected:
            self.launch(unit)
        self._send(run)
        for unit in unexpected:
            for b in unit.buckets:
                b.grads.finish_reduce()
        if self.in_backward is not None:
            for unit in self.moving:
                self.in_backward.update(unit, agreed.used, final=True)
        self.order = [i for i in agreed.order if i in wanted]
        if self.listening is not None and (late_ones := agreed.again & launched):
            self.listening.hear(self.units[i] for i in sorted(late_ones))
        self.forward.gather_log = 0
        return agreed

    @torch.no_grad()
    def _keep(self) -> None:
        for unit in self.moving:
            for b in unit.buckets:
                b.grads.keep()

    def _show(self, used: set[int]) -> None:
        if not self.moving:
            return
        if len(used) == len(self._params) and all(g.states.all_are(GradState.REDUCED) for g in self._grads):
            with torch._C.DisableTorchFunctionSubclass():  # of parameters that are released
                for grads in self._grads:
                    for p, grad in zip(grads.bucket.params, grads.shown_all, strict=True):
                        p.grad = grad
            return
        for unit in self.moving:
            if used.issuperset(unit.places):
                for b in unit.buckets:
                    b.grads.show_all()
                continue
            for slot in unit.slots:
                if id(slot.param) in used:
                    slot.bucket.grads.show(slot.index, slot.param)

    # --- a backward that failed ------------------------------------------------------------------------------
    def lost(self) -> None:
        """Autograd has let go of the backward without ending it: ``p.grad`` shows what it showed before.

        What waits for other ranks is left to :meth:`abandon`: an exception is on its way up.
        """
        run = self._run
        if run is None or self._lost:
            return
        self._lost, self.passes.backward, self.alert = True, False, True
        with torch.no_grad():
            for grads in self._grads:
                if grads.packed and run.begun:
                    grads.forget_own(run.had)
                grads.forget()
            for slot in (slot for unit in self.moving for slot in unit.slots if id(slot.param) in run.had):
                if id(slot.param) in run.hidden:
                    slot.param.grad = run.hidden.pop(id(slot.param))
                slot.bucket.grads.show_again(slot.index, slot.param)

    def recover(self) -> None:
        """If the last backward ended in an exception that the caller survived: forget what it left half done."""
        if self._run is not None and torch._C._current_graph_task_id() == -1:
            self.lost()  # on a device, autograd's thread may let go of it later than ``backward()`` has raised
        if self._lost and not self.passes.forward:
            self.abandon()

    def abandon(self) -> None:
        """Forget the last backward.

        Raises:
            UnitError: some units were updated in it already.
        """
        self.lost()
        self._run, self._lost, self.alert = None, False, True
        with torch.no_grad(), self.upward.announce(Command.ABANDON):
            for unit in self.moving:
                for b in unit.buckets:
                    b.grads.drop_reduce()
                unit.residence.drop(Pin.FORWARD)
                unit.residence.drop(Pin.BACKWARD)
                unit.release()
            for unit in self.units:
                unit.calls_made = 0
        if self.in_backward is not None:
            self.in_backward.abandon(self.units)


class _End:
    """What autograd calls when a backward has ended, and lets go of if it fails."""

    __slots__ = ("__weakref__", "backward")

    def __init__(self, backward: Backward) -> None:
        self.backward = backward

    def __call__(self) -> None:
        self.backward.end()


def _lost(backward: weakref.ref[Backward], _token: object) -> None:
    found = backward()
    if found is not None:
        found.lost()
