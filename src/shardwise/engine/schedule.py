"""The engine: when units are gathered, released and reduced, driven by module and autograd hooks.

::

    forward  unit i:  wait gather(i) · start gather(i+1) · compute · release(i)
    backward unit i:  wait gather(i) · start gather(i-1) · compute, gradients copied as they arrive
                      · last one: release(i) · finish reduce(i+1) · start reduce(i)
    step:             update the held pieces · publish

The order of units is learned from the last pass. Reduces are launched in an order that all ranks share,
whatever order gradients arrive in, so ranks that take different branches still agree; a small exchange
at the end of each backward says which parameters got a gradient anywhere.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from shardwise.comm.group import Op
from shardwise.comm.mesh import Mesh
from shardwise.comm.world import World
from shardwise.engine.control import Message
from shardwise.engine.gradmask import mask
from shardwise.engine.in_backward import InBackward
from shardwise.engine.unit import Call, Unit
from shardwise.errors import GradientError, UnitError
from shardwise.strategy import Strategy
from shardwise.tiers import Ledger
from shardwise.tiers.saved import SavedOnHost
from shardwise.trees import map_tensors, tensors_in

_NOTHING: AbstractContextManager[None] = nullcontext()
_IN_FLIGHT = 1  # reduces under way while the next unit computes; each holds a unit's gradients twice


class Sequence_:
    """The order units came in during the last pass, to guess the next one."""

    def __init__(self) -> None:
        self.last: list[Unit] = []
        self.now: list[Unit] = []

    def begin(self, guess: list[Unit] | None = None) -> None:
        if self.now:
            self.last = self.now
        elif guess is not None and not self.last:
            self.last = guess
        self.now = []

    def after(self, unit: Unit, count: int) -> list[Unit]:
        """Note that ``unit`` came; return those expected next, at most ``count``."""
        at = len(self.now)
        self.now.append(unit)
        last = self.last
        if at >= len(last) or last[at] is not unit:
            if unit not in last:
                return []
            at = last.index(unit)
        return last[at + 1 : at + 1 + count]


class Engine:
    """Everything that belongs to one sharded model.

    Args:
        module: the root module.
        strategy: default for its units.
        mesh: shard and replicate axes.
    """

    def __init__(self, module: nn.Module, strategy: Strategy, mesh: Mesh) -> None:
        self.module, self.strategy, self.mesh = module, strategy, mesh
        self.world: World = mesh.world
        self.ledger = Ledger()
        self.units: list[Unit] = []
        self.sync = True  # False inside no_sync()
        self.local = False  # True inside LocalSGD: every rank steps on gradients of its own
        self.forward_active = self.backward_active = False
        self.backward_id = 0
        self._forward, self._eval, self._backward = Sequence_(), Sequence_(), Sequence_()
        self._handles: list[Any] = []
        self._tag = mesh.new_tag()
        self.stay_gathered: list[Unit] = []
        self._inflight: deque[Unit] = deque()
        self._launched: list[Unit] = []
        self._ready: set[int] = set()
        self.fired: list[int] = []
        self._order: list[int] = []  # unit indices expected to be reduced, in launch order
        self._next = 0
        self.gather_log = 0
        self._keep_graph = False
        self.in_backward: InBackward | None = None  # updates units as soon as their gradients are reduced
        self._later: list[Unit] = []
        self._ahead = 1 + (strategy.offload_prefetch if strategy.offload_params != "device" else 0)
        self.saved: SavedOnHost | None = None  # activations on the host

    def __deepcopy__(self, memo: Any) -> Any:
        raise UnitError(
            "a sharded module cannot be copied: its values are spread over the ranks",
            fix="copy the module before sharding it and shard the copy too (for EMA: update the copy "
            "inside 'with shardwise.gathered(model):')",
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnitError("a sharded module cannot be pickled", fix="save model.state_dict() instead")

    def op(self, kind: str) -> Op:
        return Op(kind, f"model {type(self.module).__name__}", 8 * self._tag + (0 if kind == "control" else 1))

    # --- construction ----------------------------------------------------------------------
    def add(self, units: Iterable[Unit]) -> None:
        """Take over units, in the order in which they were registered on every rank."""
        for unit in units:
            unit.engine = self
            unit.index = len(self.units)
            self.units.append(unit)

    def install(self) -> None:
        """Hook the modules. ``torch.compile`` is told to stay out of the hooks."""
        eager: Callable[[Any], Any] = torch.compiler.disable
        root = self.module
        self._handles.append(
            root.register_forward_pre_hook(eager(self._root_pre_forward), prepend=True, with_kwargs=True)
        )
        for unit in self.units:
            if not unit.handles:
                unit.handles = [
                    unit.module.register_forward_pre_hook(eager(_PreForward(unit)), with_kwargs=True),
                    unit.module.register_forward_hook(eager(_PostForward(unit))),
                ]
        self._handles.append(root.register_forward_hook(eager(self._root_post_forward)))
        # Until a backward has shown better: the reverse of registration, with parents after their children.
        self._order = self._default_order()
        self._choose_what_stays()

    def before_forward(self, hook: Callable[[nn.Module, Any], None]) -> None:
        """Call ``hook`` before each forward of the root, until a parent engine takes over."""
        self._handles.append(self.module.register_forward_pre_hook(torch.compiler.disable(hook), prepend=True))

    def uninstall(self) -> None:
        """Remove the root's hooks: a parent engine has taken over the units."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _default_order(self) -> list[int]:
        depth = {u.index: (u.name.count(".") + 1 if u.name else 0) for u in self.units}
        live = [u.index for u in self.units if any(p.requires_grad for p in u.params)]
        return sorted(live, key=lambda i: (depth[i] == 0, -i))

    # --- forward ---------------------------------------------------------------------------
    def _root_pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.forget_failed_backward()
        if self.world.join is not None:
            self.world.join.forward()
        self.forward_active = True
        self._sequence().begin()
        self._choose_what_stays()
        training = torch.is_grad_enabled() and module.training
        if training and self.strategy.broadcast_buffers and self.sync and self.world.size > 1:
            with self.told("buffers"):
                join = self.world.join  # rank 0 may have run out of data
                self.send_buffers(0 if join is None else join.leader)

    def _root_post_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.forward_active = False
        self._drop("forward")
        tracker = self.world.tracker
        tracker.phase = tracker.unit = ""

    def _sequence(self) -> Sequence_:
        return self._forward if torch.is_grad_enabled() else self._eval

    def _drop(self, reason: str) -> None:
        """Nothing needs the units that were kept gathered for ``reason`` any more."""
        for unit in self.units:
            if reason in unit.kept_for or unit.staged:
                unit.kept_for.discard(reason)
                unit.release()

    def pre_forward(self, unit: Unit, args: Any, kwargs: Any) -> Any:
        tracker = self.world.tracker
        tracker.phase, tracker.unit = "forward", unit.label
        if self.backward_active:  # recomputing under activation checkpointing
            unit.gather()
        else:
            following = self._sequence().after(unit, self._ahead)
            self._log_gather(unit)
            unit.gather()
            self._prefetch(following)
        call = None
        if torch.is_grad_enabled():
            unit.watch_trainable()
            if unit.has_frozen and unit.split:
                call = Call(unit)
                for t in tensors_in((args, kwargs)):
                    if t.requires_grad:
                        call.inputs += 1
                        t.register_hook(call.input_ready)
        unit.call = call
        if unit.strategy.param_dtype is not None:
            dtype = unit.buckets[0].dtype if unit.buckets else None
            if dtype is not None and dtype.is_floating_point:
                return map_tensors((args, kwargs), partial(_in_dtype, dtype))
        return None

    def post_forward(self, unit: Unit, output: Any) -> None:
        will_backward = False
        if torch.is_grad_enabled():
            hook = _PreBackward(unit, unit.call)
            for t in tensors_in(output):
                if t.requires_grad and t.is_floating_point():
                    t.register_hook(hook)
                    will_backward = True
            if not will_backward and unit.split and any(p.requires_grad for p in unit.params):
                # The graph may run through something this loop cannot see: do not take its values away.
                unit.kept_for.add("backward")
        if self.backward_active:
            return
        if self._later:
            following, self._later = self._later, []
            following[0].catch_up()
            following[0].behind = False
            self._prefetch(following)
        if not (will_backward and unit in self.stay_gathered):
            unit.release()

    def _choose_what_stays(self) -> None:
        """Units that are not released between forward and backward: the root's own, and the last two.

        Backward begins with the last one and gathers the one before it ahead, so keeping both costs nothing.
        Before the first forward has shown its order, that of registration is as good a guess as any.
        """
        order = self._forward.last or self.units
        below = [u for u in order if u.module is not self.module]
        self.stay_gathered = [u for u in self.units if u.module is self.module] + below[-2:]

    def _prefetch(self, following: list[Unit]) -> None:
        """Gather the next unit, and bring shards of those after it from their home."""
        if following and following[0].behind:
            self._later = following  # once this unit computes: until its update has taken place, nothing else would
            return
        for k, unit in enumerate(following):
            if k == 0 and unit.split:
                unit.start_gather()
            else:
                unit.stage()

    def _log_gather(self, unit: Unit) -> None:
        if unit.split and unit.mesh.shard.size > 1 and not unit.gathered and unit.gathering is None:
            self.gather_log = zlib.crc32(unit.name.encode(), self.gather_log)

    def send_buffers(self, source: int) -> None:
        """The buffers of rank ``source`` for everyone, one message per dtype (what DDP does before a forward)."""
        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for b in self.module.buffers():
            if b.numel():
                kinds.setdefault(b.dtype, []).append(b)
        with torch.no_grad():
            for buffers in kinds.values():
                flat = torch.cat([b.detach().reshape(-1) for b in buffers])
                self.mesh.whole.broadcast(flat, self.op("broadcast"), source).wait()
                if self.world.rank != source:
                    for b, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                        b.copy_(part.view_as(b))

    # --- backward --------------------------------------------------------------------------
    def begin_backward(self) -> None:
        """First sign of a backward: arrange to be called when autograd has finished it."""
        if self.backward_active:
            return
        if self.sync:
            with self.told("backward", partial(mask, self), self._settings):
                pass
        if self.in_backward is not None:
            self._check_in_backward(self.in_backward)
        self.start_backward()
        self._keep_graph = torch.is_grad_enabled()  # create_graph=True: a second backward needs the values
        self._backward.begin(self._forward.now[::-1])
        Variable._execution_engine.queue_callback(self._end_backward)

    def _settings(self) -> dict[int, Any]:
        """What ranks that have run out of data do not know yet of the optimizers that this backward will step."""
        join = self.world.join
        return {} if self.in_backward is None or join is None else join.settings()

    def _check_in_backward(self, updates: InBackward) -> None:
        for what, wrong in (
            ("create_graph=True", torch.is_grad_enabled()), ("LocalSGD", self.local),
        ):  # fmt: skip
            if wrong:
                raise UnitError(f"optimizer_in_backward does not work with {what}", fix="leave one of them out")

    def start_backward(self) -> None:
        """Nothing has arrived yet and nothing is launched."""
        for unit in self.units:
            unit.catch_up()
            unit.behind = False
        self.backward_active = True
        self.forward_active = self._keep_graph = False
        self.backward_id += 1
        self._next = 0
        if self.in_backward is not None:
            self.in_backward.begin(self.units)
        self._ready.clear()
        self._launched.clear()
        self.fired.clear()

    def pre_backward(self, unit: Unit, call: Call | None) -> None:
        tracker = self.world.tracker
        tracker.phase, tracker.unit = "backward", unit.label
        self.begin_backward()
        self.launch_ready()
        if unit.backward_id != self.backward_id or not unit.gathered:
            following = self._backward.after(unit, self._ahead)
            unit.gather()
            self._prefetch(following)
            unit.begin_backward(self.backward_id)
            if self._keep_graph and unit.split:
                unit.kept_for.add("backward")
        if call is not None and call.inputs > 0:
            unit.calls.add(call)

    def unit_done(self, unit: Unit) -> None:
        unit.release()
        if unit.index not in self.fired:
            self.fired.append(unit.index)
        if self.sync:
            # Not launched here: autograd still holds the gradient that came last, and the reduce wants memory.
            self._ready.add(unit.index)

    def launch_ready(self) -> None:
        """Start the reduces of units that are done, in the common order. Called at the next event of a backward."""
        while self._next < len(self._order) and self._order[self._next] in self._ready:
            unit = self.units[self._order[self._next]]
            self._next += 1
            self._launch(unit)

    @torch.no_grad()
    def _launch(self, unit: Unit) -> None:
        with self.told("launch", unit.index):
            self._reduce(unit)

    def _reduce(self, unit: Unit) -> None:
        while len(self._inflight) >= _IN_FLIGHT:
            oldest = self._inflight.popleft()
            for b in oldest.buckets:
                if b.grads.split or self.in_backward is not None:
                    b.grads.finish_reduce()
                else:
                    b.grads.advance_reduce()
            if self.in_backward is not None:
                self.in_backward.update(oldest)
        for b in unit.buckets:
            if any(p.requires_grad for p in b.params):
                b.grads.launch_reduce()
        self._inflight.append(unit)
        self._launched.append(unit)

    def _end_backward(self) -> None:
        """Autograd is done: reduce what is left, agree on what got gradients, show them in ``p.grad``."""
        tracker = self.world.tracker
        tracker.phase = "the end of backward"
        try:
            for unit in self.units:
                unit.begin_backward(self.backward_id)  # those that took no part may have been zeroed all the same
            if self.sync:
                with self.told("backward_ends", self.gather_log):
                    self._show(self._reduce_rest())
                    if self.in_backward is not None:
                        self.in_backward.end(self.units)
            else:
                self._show({id(p) for u in self.units for b, i, p in u.slots if b.grads.arrived[i]})
                if self.local:
                    self._keep()
            if not self._keep_graph:
                self._drop("backward")
                for unit in self.units:
                    unit.release()
        finally:
            self.backward_active = False
            self._inflight.clear()
            tracker.phase = tracker.unit = ""

    @torch.no_grad()
    def _keep(self) -> None:
        for unit in self.units:
            for b in unit.buckets:
                b.grads.keep()

    def _show(self, used: set[int]) -> None:
        for unit in self.units:
            for b, i, p in unit.slots:
                if id(p) in used or b.grads.shown[i]:
                    b.grads.show(i, p)

    def forget_failed_backward(self) -> None:
        """If the last backward ended in an exception that the caller survived, abandon it. Not called by followers."""
        if self.backward_active and torch._C._current_graph_task_id() == -1:
            self._abandon_backward()

    def _abandon_backward(self) -> None:
        """The last backward ended in an exception that the caller survived: forget what it left half done."""
        with torch.no_grad(), self.told("abandon"):
            for unit in self.units:
                for b in unit.buckets:
                    b.grads.abandon()
                unit.kept_for.clear()
                unit.release()
                if unit.backward_id == self.backward_id:
                    for b, i, p in unit.slots:
                        if b.grads.shown[i] and not b.grads.spent[i]:
                            b.grads.show(i, p)
        self._inflight.clear()
        self.backward_active = False
        if self.in_backward is not None:
            self.in_backward.abandon(self.units)

    def _reduce_rest(self) -> set[int]:
        with torch.no_grad():
            # 1. What was reduced last time, on any rank, is reduced now, with zeros where nothing arrived.
            for index in self._order[self._next :]:
                self._launch(self.units[index])
            launched = {u.index for u in self._launched}
            # 2. Which parameters got a gradient, and where more arrived after their unit's reduce?
            arrived = {id(p) for u in self.units for b, i, p in u.slots if b.grads.seen[i]}
            message = Message(self, arrived, [u.index for u in self.units if u.any_arrived])
            transfer = message.start()
            for unit in self._launched:
                for b in unit.buckets:
                    b.grads.finish_reduce()
            self._inflight.clear()
            used, again, order = message.finish(transfer)
            # 3. What nobody expected: units used for the first time, or a second arrival in one backward.
            wanted = {u.index for u in self.units if any(id(p) in used for p in u.params)}
            for unit in self.units:
                if unit.index in again or (unit.index in wanted and unit.index not in launched):
                    self._launch(unit)
            for unit in self.units:
                for b in unit.buckets:
                    b.grads.finish_reduce()
                if self.in_backward is not None:
                    self.in_backward.update(unit, used)
                for b in unit.buckets:
                    b.grads.seen = [False] * len(b.params)
            self._order = [i for i in order if i in wanted] + [
                i for i in self._default_order() if i in wanted and i not in order
            ]
            self.gather_log = 0
        return used

    @torch.no_grad()
    def scale_grads(self, factor: float) -> None:
        """Multiply every reduced gradient by ``factor``."""
        if factor != 1.0:
            if self.in_backward is not None:
                raise GradientError(
                    f"gradients are to be multiplied by {factor:g} after optimizer_in_backward has used them up",
                    fix="gradient_accumulation_steps=1 and no loss scaling, or leave optimizer_in_backward out",
                )
            with self.told("scale", factor):
                slots = [(b, i) for u in self.units for b, i, p in u.slots if p.grad is not None]
                if pieces := [g for b, i in slots for g in b.grads.for_step(i) or ()]:
                    torch._foreach_mul_(pieces, factor)

    def told(self, kind: str, *args: Any) -> AbstractContextManager[None]:
        """Around what needs all ranks: those that have run out of data do the same. See :mod:`shardwise.engine.join`.

        Costs one look at an attribute outside of join_uneven_inputs.
        """
        join = self.world.join
        return _NOTHING if join is None else join.event(kind, self, *args)


class _PreForward:
    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.unit.engine.pre_forward(self.unit, args, kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.unit.engine.__deepcopy__(memo)


class _PostForward(_PreForward):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.unit.engine.post_forward(self.unit, output)


class _PreBackward:
    __slots__ = ("call", "unit")

    def __init__(self, unit: Unit, call: Call | None) -> None:
        self.unit, self.call = unit, call

    def __call__(self, grad: torch.Tensor) -> None:
        self.unit.engine.pre_backward(self.unit, self.call)


def _in_dtype(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor
