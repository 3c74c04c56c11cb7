"""The engine: the units of one sharded model, their forward and backward, and the table of what all ranks do together.

A rank with data comes to these commands through its forward and backward. A rank whose data has ended is told which
one comes next, and gives it to :meth:`Engine.execute`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.comm.mesh import Mesh
from shardwise.comm.process import Process
from shardwise.comm.stats import Op
from shardwise.engine.backward import Backward
from shardwise.engine.binding import Installed, copy_bindings
from shardwise.engine.commands import Command
from shardwise.engine.forward import Forward
from shardwise.engine.gradmask import mask, take_mask
from shardwise.engine.in_backward import InBackward
from shardwise.engine.integrity import Integrity
from shardwise.engine.joined import start_gathers
from shardwise.engine.passes import Call, Passes
from shardwise.engine.residency import Pin
from shardwise.engine.saved_tensors import SavedTensors
from shardwise.engine.select import has_forward
from shardwise.engine.unit import Unit
from shardwise.errors import GradientError, UnitError
from shardwise.strategy import Strategy
from shardwise.tiers import Ledger
from shardwise.tiers.saved_tensors import SavedOnHost

_MESSAGES = ("control", "broadcast", "word")  # of a whole model; each kind has a tag
_NOTHING: AbstractContextManager[None] = nullcontext()


class Engine:
    """Everything that belongs to one sharded model.

    Args:
        module: the root module.
        strategy: default for its units.
        mesh: shard and replicate axes.
        copy: it is the engine of a copied model.

    Attributes:
        world: the ranks.
        ledger: live bytes by state.
        units: in the order in which they were registered on every rank; the root's own comes last.
        passes: which pass is under way.
        forward, backward: the schedules.
        saved: what stands for views of flat buffers that autograd saves.
        host_activations: activations on the host; ``None``: they stay on the device.
        integrity: what the model looked like when it was sharded.
        runs_alone: weights are files', and no other rank has a part in them: what a script puts in their place is its
            own, unless it is to be trained.
        refuse_training: why a forward with gradients makes no sense; until a parent engine takes over.
        installed: hooks on the root module.
        last_gathered: see :class:`~shardwise.engine.unit.Upward`; a forward lets go of it.
        on_copy: called with this engine, a copy of it and ``copy.deepcopy``'s memo, when the model was copied.
    """

    def __init__(self, module: nn.Module, strategy: Strategy, mesh: Mesh, *, copy: bool = False) -> None:
        self.module, self.strategy, self.mesh = module, strategy, mesh
        self.world: Process = mesh.world
        self.ledger = Ledger()
        self.units: list[Unit] = []
        self.passes = Passes()
        self._tag = mesh.new_copy_tag() if copy else mesh.new_tag()
        ahead = 1 + (strategy.offload_prefetch if strategy.offload_params != "device" else 0)
        self.forward = Forward(module, self.passes, self.world.tracker, ahead, self._begins)
        if not has_forward(module):  # the script calls its parts
            self.forward.starts = self.before_forward
        self.backward = Backward(
            mesh, self.passes, self.world.tracker, self.forward, self, self.op("control"), self._settings,
            self._leader,
        )  # fmt: skip
        self.saved = SavedTensors(self.backward.bring, lambda: self.forward.calls)
        self.forward.saved = self.saved
        self.host_activations: SavedOnHost | None = None
        self.integrity: Integrity | None = None
        self.runs_alone = False
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self.refuse_training: UnitError | None = None
        self.installed: list[Installed] = []
        self.last_gathered: Unit | None = None
        self.on_copy: list[Callable[[Engine, Engine, Any], None]] = []

    def op(self, kind: str, said: str | None = None) -> Op:
        """What a message of the whole model is called.

        Args:
            said: of whom or what it is, in reports; the model by default.
        """
        tag, which = self._tag, _MESSAGES.index(kind)
        number = 8 * tag + which if isinstance(tag, int) else lambda: 8 * tag() + which
        return Op(kind, said or f"model {type(self.module).__name__}", number)

    # --- construction ----------------------------------------------------------------------
    def take_over(self, units: Iterable[Unit]) -> None:
        """The model has these units, in the order in which they were registered on every rank."""
        self.units = list(units)
        for index, unit in enumerate(self.units):
            unit.index, unit.upward = index, self
        self.forward.take_over(self.units)
        self.backward.take_over(self.units)
        self.saved.follow(self.units)

    # --- what units and schedules ask --------------------------------------------------------------
    def announce(self, command: Command, *args: Any) -> AbstractContextManager[None]:
        """Around what needs all ranks: those that have run out of data do the same. See :mod:`shardwise.engine.join`.

        Costs one look at an attribute outside of join_uneven_inputs.
        """
        join = self.world.join
        return _NOTHING if join is None else join.event(command, self, *args)

    def is_copied(self, memo: Any) -> bool:
        """Is the whole model being copied, given ``copy.deepcopy``'s memo?"""
        return id(self.module) in memo

    def _begins(self, unit: Unit, call: Call, number: int) -> None:
        self.backward.enter(unit, call, number)

    def remember(self, optimizer: Optimizer) -> None:
        """An optimizer that holds parameters of the model was attached. It is not kept alive."""
        self._optimizers.append(weakref.ref(optimizer))

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that were attached and live, in that order, which all ranks share."""
        return [found for ref in self._optimizers if (found := ref()) is not None]

    def pin_for_access(self) -> Pin | None:
        """See :class:`~shardwise.engine.unit.Upward`, of which this is one."""
        return self.passes.pin_for_access()

    def recover(self) -> None:
        """Forget a backward that failed, if the last one did."""
        self.backward.recover()

    def saving(self) -> AbstractContextManager[Any]:
        """Around code whose results autograd may save of values that go away."""
        return self.saved.hooks()

    def let_go_of_last(self, but: Collection[Unit] = ()) -> None:
        """A block of ``gathered()`` begins that needs other units, or none."""
        last, self.last_gathered = self.last_gathered, None
        if last is not None and last not in but:
            last.release()
            last.watch()

    def check(self) -> None:
        """Raise, or take over, where parameters are no longer the ones that were sharded."""
        if self.integrity is not None:
            self.integrity.check(self.units)

    def _settings(self) -> dict[int, Any]:
        join = self.world.join
        return {} if self.in_backward is None or join is None else join.settings()

    def _leader(self) -> int:
        join = self.world.join  # rank 0 may have run out of data, and its units with it
        return 0 if join is None else join.leader

    # --- settings that others change -----------------------------------------------------------------
    @property
    def sync(self) -> bool:
        """``False`` inside ``no_sync()``: gradients stay on this rank."""
        return self.backward.sync

    @sync.setter
    def sync(self, on: bool) -> None:
        self.backward.sync = on

    @property
    def local(self) -> bool:
        """Inside LocalSGD: every rank steps on gradients of its own."""
        return self.backward.local

    @local.setter
    def local(self, on: bool) -> None:
        self.backward.local = on

    @property
    def in_backward(self) -> InBackward | None:
        """Updates units as soon as their gradients are reduced; ``None``: ``step()`` does."""
        return self.backward.in_backward

    @property
    def reduced(self) -> int:
        """Backwards whose gradients were reduced: equally many on all ranks."""
        return self.backward.reduced

    @property
    def backward_id(self) -> int:
        """Backwards that have begun."""
        return self.backward.count

    # --- the root's forward -----------------------------------------------------------------------------
    def before_forward(self) -> None:
        """The root module is about to run."""
        self.backward.recover()
        if self.refuse_training is not None and torch.is_grad_enabled():
            raise self.refuse_training
        self.runs()
        if self.last_gathered is not None:
            self.let_go_of_last()
        if not self.passes.active:
            if not self.runs_alone or torch.is_grad_enabled():
                self.check()
            for unit in self.backward.moving:
                if unit.apart:
                    unit.reconcile_values()
                if unit.splits and not unit.updating:  # an update may be reading gradients on another stream
                    for b in unit.buckets:
                        b.grads.free_zeroed()
        self.forward.begin()
        training = torch.is_grad_enabled() and self.module.training
        if training and self.strategy.broadcast_buffers and self.sync and self.world.size > 1:
            with self.announce(Command.BUFFERS):
                self.send_buffers(self._leader())

    def runs(self, part: int = 0) -> None:
        """A forward begins: that shows ranks without data that this one has some.

        Args:
            part: which part of the model runs; 0 is all of it.
        """
        if self.world.join is not None:
            self.world.join.forward(part)

    def send_buffers(self, source: int) -> None:
        """The buffers of rank ``source`` for everyone, one per dtype and place (what DDP does before a forward).

        Those that are on the host, of a model that is not, travel between hosts.

        They are written under the version that they have: what a forward before this one saved of them for its
        backward (batch norms do, and do not use it in training) is not taken for a mistake of the script.
        """
        kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for b in self.module.buffers() if self.integrity is None else self.integrity.buffers:
            if b.numel():
                kinds.setdefault((b.dtype, b.device), []).append(b)
        with torch.no_grad():
            for (_, device), buffers in kinds.items():
                flat = torch.cat([b.detach().reshape(-1) for b in buffers])
                group = self.mesh.control if device.type == "cpu" else self.mesh.whole
                group.broadcast(flat, self.op("broadcast"), source).wait()
                if self.world.rank != source:
                    with torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):
                        for b, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                            b.copy_(part.view_as(b))

    # --- gradients ---------------------------------------------------------------------------------------
    @torch.no_grad()
    def scale_grads(self, factor: float) -> None:
        """Multiply every reduced gradient by ``factor``."""
        if factor != 1.0:
            if self.in_backward is not None:
                raise GradientError(
                    f"gradients are to be multiplied by {factor:g} after optimizer_in_backward has used them up",
                    fix="gradient_accumulation_steps=1 and no loss scaling, or leave optimizer_in_backward out",
                )
            with self.announce(Command.SCALE, factor):
                slots = [s for u in self.units for s in u.slots if s.param.grad is not None]
                if pieces := [g for s in slots for g in s.bucket.grads.for_step(s.index) or ()]:
                    torch._foreach_mul_(pieces, factor)
                for s in slots:
                    s.bucket.grads.scalings.add(s.index, factor)

    # --- one table: what a rank without data does with the others -------------------------------------------
    def execute(self, command: Command, *args: Any) -> None:
        """Do what the others do, without data. Args as :class:`Command` says."""
        _TABLE[command](self, *args)

    def _follow_gather(self, indices: Sequence[int]) -> None:
        units = [self.units[i] for i in indices]
        for unit in units:
            if not unit.residence.staging:  # read ahead for this
                unit.rest()
        start_gathers(units)
        if self.forward.repeats is not None:
            self.forward.follow(units[-1])
        for unit in units:
            unit.gather()
            unit.release()

    def _follow_buffers(self) -> None:
        self.send_buffers(self._leader())

    def _follow_backward(self, gradients: bytes, settings: dict[int, Any]) -> None:
        self.take_gradients(gradients)
        if self.world.join is not None:
            self.world.join.take_settings(settings)
        self.backward.start()

    def _follow_reduce(self, index: int) -> None:
        self.backward.follow_launch(self.units[index])

    def _follow_end(self, gather_log: int) -> None:
        self.backward.end(gather_log)

    def _follow_values(self, unit: int, bucket: int, kind: str) -> None:
        owner = self.units[unit]
        full = owner.full_values if kind == "values" else owner.full_grads
        full(owner.buckets[bucket])

    def rest(self) -> None:
        """Between two passes, the same on every rank: free gathered values, also those kept for a pass to come."""
        for unit in self.units:
            unit.rest()

    # --- what ranks without data take over ---------------------------------------------------------------------
    def summary(self) -> Any:
        """What all ranks know alike in training: learned orders, and which gradients there are. Picklable."""
        orders = [([u.index for u in o.last], [u.index for u in o.now]) for o in self._orders]
        return orders, list(self.backward.order), self.forward.gather_log, mask(self.units)

    def take_summary(self, found: Any) -> None:
        """Make the :meth:`summary` of another rank this one's."""
        orders, self.backward.order, self.forward.gather_log, gradients = found
        for order, (last, now) in zip(self._orders, orders, strict=True):
            order.last, order.now = [self.units[i] for i in last], [self.units[i] for i in now]
        self.take_gradients(gradients)

    def take_gradients(self, gradients: bytes) -> None:
        """Have gradients where another rank has them."""
        take_mask(self.units, gradients)

    @property
    def _orders(self) -> Sequence[Any]:
        return self.forward.training, self.forward.evaluation, self.backward.seen_order

    # --- copies ------------------------------------------------------------------------------------------------
    def uninstall(self) -> None:
        """Remove the root's hooks: a parent engine has taken over the units."""
        for hook in self.installed:
            hook.remove()
        self.installed.clear()

    def __deepcopy__(self, memo: Any) -> Engine:
        """A second model, sharded alike: each rank copies what it holds, nothing is sent.

        Modules copy themselves as ever. The engine is the last attribute of the root module: when it is copied, every
        parameter and module inside has its copy in the memo, and units are put around them.
        """
        if not self.is_copied(memo):
            raise UnitError("an engine is copied without its model", fix="copy.deepcopy(model)")
        of = _Copies(memo)
        new = memo[id(self)] = Engine(of(self.module), self.strategy, self.mesh, copy=True)
        if self.in_backward is not None:
            new.backward.in_backward = self.in_backward.for_copy()
        new.take_over([unit.copied(of, new.ledger, new) for unit in self.units])
        for old, unit in zip(self.units, new.units, strict=True):
            copy_bindings(old, unit, new.forward, new.backward, memo)
        new.backward.listen_as(self.backward)
        new.installed = [Installed(of(hook.module), hook.key) for hook in self.installed]
        new.runs_alone = self.runs_alone
        if self.integrity is not None:
            new.integrity = self.integrity.copied(of)
        for callback in self.on_copy:
            callback(self, new, memo)
        new.on_copy = list(self.on_copy)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnitError("a sharded module cannot be pickled", fix="save model.state_dict() instead")


class _Copies:
    """What ``copy.deepcopy`` has made of something, by its memo."""

    def __init__(self, memo: Any) -> None:
        self.memo = memo

    def __call__(self, item: Any) -> Any:
        found = self.memo.get(id(item))
        if found is None:
            raise UnitError(
                f"a {type(item).__name__} of the model is not reached by its copy",
                fix="give the model no __deepcopy__ that leaves modules or parameters out",
            )
        return found


_TABLE: dict[Command, Callable[..., None]] = {
    Command.BUFFERS: Engine._follow_buffers,
    Command.GATHER: Engine._follow_gather,
    Command.BACKWARD: Engine._follow_backward,
    Command.REDUCE: Engine._follow_reduce,
    Command.BACKWARD_ENDS: Engine._follow_end,
    Command.ABANDON: lambda engine: engine.backward.abandon(),
    Command.SCALE: Engine.scale_grads,
    Command.VALUES: Engine._follow_values,
}
