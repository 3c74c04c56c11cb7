"""A unit: the module subtree whose parameters are gathered, released and reduced together.

A unit knows its buckets and where their values are (:mod:`shardwise.engine.residency`). What happens when is decided
by the forward and backward schedules above it. It tells upward through two callbacks that it is given: the engine
announces what needs all ranks, and says whether values may be brought for somebody who reads a parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.comm.mesh import Mesh
from shardwise.engine.bucket import Bucket
from shardwise.engine.commands import Command
from shardwise.engine.failure import Failure, require_valid
from shardwise.engine.guard import guard, mark, refuse, unguard
from shardwise.engine.residency import Pin, Residence, Residency
from shardwise.errors import CheckpointError, UnitError, UpdateFailed
from shardwise.strategy import Strategy
from shardwise.tiers import Ledger
from shardwise.tiers.home import Home
from shardwise.tiers.transfer import Transfer


class Upward(Protocol):
    """What a unit asks of the engine that owns it.

    Attributes:
        last_gathered: what a block of ``gathered()`` has left here for the next one.
    """

    last_gathered: Unit | None

    @property
    def in_backward(self) -> Any:
        """What updates units during the backward; ``None``: ``step()`` does."""

    def remember(self, optimizer: Optimizer) -> None:
        """An optimizer that holds parameters of the model was attached."""

    def announce(self, command: Command, *args: Any) -> AbstractContextManager[None]:
        """Around what needs all ranks, so that those without data do it too."""

    def pin_for_access(self) -> Pin | None:
        """May values be gathered because a parameter is read now, and for what are they kept then?

        ``None``: not now, since other ranks may not be here for the same reason.
        """

    def is_copied(self, memo: Any) -> bool:
        """Is the whole model being copied, given ``copy.deepcopy``'s memo?"""

    def recover(self) -> None:
        """Forget a backward that failed, if the last one did."""

    def saving(self) -> AbstractContextManager[Any]:
        """Around code whose results autograd may save of values that go away."""

    def check(self) -> None:
        """Raise, or take over, where parameters are no longer the ones that were sharded."""

    def let_go_of_last(self, but: Collection[Unit] = ()) -> None:
        """A block of ``gathered()`` begins that needs other units, or none."""


class Listener(Protocol):
    """What hears of gradients as autograd makes them.

    Attributes:
        alert: no backward is known to be under way, or some parameters had gradients before it.
    """

    alert: bool

    def expect(self, slot: Slot) -> None:
        """Autograd is about to put a gradient into ``p.grad``, or to add it to what is there."""

    def arrived(self, slot: Slot) -> None:
        """It has done so."""


class PendingUpdate(Protocol):
    """The update of one bucket, which takes place somewhere else; see :mod:`shardwise.engine.deferred_update`."""

    def wait(self) -> None: ...


class Slot:
    """One parameter of a unit.

    Attributes:
        unit, bucket, index: where its values are.
        param: the parameter.
        names: all its full names; tied parameters have several.
        holders: the modules that have it, each with the attribute's name.
        told: its unit's listener hears of gradients that have arrived, too.
    """

    __slots__ = ("__weakref__", "bucket", "holders", "index", "names", "param", "told", "unit")

    def __init__(
        self,
        unit: Unit,
        bucket: Bucket,
        index: int,
        param: nn.Parameter,
        names: list[str],
        holders: list[tuple[nn.Module, str]],
    ) -> None:
        self.unit, self.bucket, self.index, self.param = unit, bucket, index, param
        self.names, self.holders = names, holders
        self.told = False

    # Hooks have weak references: the collector cannot look into autograd, and a dropped model would never go.
    def watch(self) -> None:
        """Tell the unit's listener of gradients that are about to arrive."""
        self.param.register_hook(partial(_expect, weakref.ref(self)))

    def tell(self) -> None:
        """Tell it of those that have arrived, too."""
        if not self.told:
            self.told = True
            self.param.register_post_accumulate_grad_hook(partial(_arrived, weakref.ref(self)))


def _expect(slot: weakref.ref[Slot], _grad: torch.Tensor) -> None:
    found = slot()
    if found is not None and (listener := found.unit.listener) is not None and listener.alert:
        listener.expect(found)


def _arrived(slot: weakref.ref[Slot], _param: nn.Parameter) -> None:
    found = slot()
    if found is not None and found.unit.listener is not None:
        found.unit.listener.arrived(found)


class Unit:
    """Buckets of one module subtree and their state.

    Args:
        name: full name of ``module`` in the sharded model.
        module: the subtree; hooks on it drive the unit.
        members: parameters it answers for, each with all its full names and the dtype it computes in (``None``: as
            the strategy says).
        mesh, strategy, ledger: see :class:`~shardwise.engine.bucket.Bucket`.
        home: of what the strategy offloads; ``None`` if that is nothing.
        upward: the engine's side.
        make: makes a bucket of parameters and their names, in place of the class :class:`Bucket`. All parameters are
            in one then.

    Attributes:
        index: position among the engine's units, in the order of registration; equal on all ranks.
        label: the name as reports show it.
        buckets: one per dtype, and apart for parameters that are frozen when the model is sharded.
        slots: one per parameter, bucket by bucket.
        places: per parameter (by ``id``), its bucket and index, in the order of ``slots``.
        unwatched: slots whose gradients would have to be listened to, and are not, since their parameters need none.
        listener: hears of the others' gradients.
        heard: its module's forwards are noticed.
        apart: values of some bucket are another tensor than the master values.
        splits: gradients of some bucket are split.
        released: values of some bucket come and go. ``settled``: nothing of any bucket ever moves.
        offloaded: what gathers read is at another home.
        device: where values come to and go from.
        residence: where the values are, and who needs them.
        joins: its gather may share a message with those of other units; ``gather_bytes``: values that come and go.
        calls_made: forwards under autograd since the last backward.
        saved_in_fp32: a script has converted parameters in half precision: its state dict is in fp32.
        lingers: values are released, and the script has a view of them that keeps their bytes.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        members: Sequence[tuple[nn.Parameter, list[str], torch.dtype | None]],
        holders: Callable[[str], tuple[nn.Module, str]],
        mesh: Mesh,
        strategy: Strategy,
        ledger: Ledger,
        home: Home | None,
        upward: Upward,
        make: Callable[[str, list[nn.Parameter], list[str]], Bucket] | None = None,
    ) -> None:
        self.name, self.module, self.upward = name, module, upward
        self.mesh, self.strategy, self.home = mesh, strategy, home
        self.index = 0
        self.label = f"'{name}'" if name else "'(root)'"
        kinds: dict[Any, list[tuple[nn.Parameter, list[str]]]] = {}
        for p, names, compute in members:
            kind = (p.dtype, p.requires_grad, compute) if make is None else (None, None, None)
            kinds.setdefault(kind, []).append((p, names))
        self.buckets: list[Bucket] = []
        self.slots: list[Slot] = []
        for (_, _, compute), mine in kinds.items():
            params, names = [p for p, _ in mine], [names[0] for _, names in mine]
            bucket = (
                Bucket(
                    self.label, params, names, mesh, strategy, ledger, home,
                    self.reconcile, self.finish_transfers, self.finish_update, compute,
                )
                if make is None
                else make(self.label, params, names)
            )  # fmt: skip
            self.buckets.append(bucket)
            for i, (p, names) in enumerate(mine):
                mark(p, self, names[0])
                self.slots.append(Slot(self, bucket, i, p, names, [holders(n) for n in names]))
        self.places = {id(s.param): (s.bucket, s.index) for s in self.slots}
        trainable = all(b.placement.trainable for b in self.buckets)
        self._wire_bytes = sum([b.wire_bytes for b in self.buckets]) if trainable else None
        self.apart = any(not b.placement.aliased for b in self.buckets)
        self.settled = all(b.placement.settled for b in self.buckets)
        self.splits = any(b.placement.grads_split for b in self.buckets)
        self.unwatched = [s for s in self.slots if not s.bucket.placement.settled]
        self.listener: Listener | None = None
        self.heard = False
        self.released = any(b.placement.released for b in self.buckets)
        self.offloaded = any(b.placement.params_offloaded for b in self.buckets)
        going = [b for b in self.buckets if b.placement.released]
        self.gather_bytes = sum(b.flat.nbytes for b in going)
        self.device = next((b.device for b in going), torch.device("cpu"))
        self.joins = self.gather_bytes > 0 and all(b.joins for b in going)
        self.residence = Residence(self.label, released=self.released)
        self._failure: Failure | None = None
        self.calls_made = 0  # forwards with gradients since the last backward
        self.saved_in_fp32 = False
        self.lingers = False  # released, and the bytes are still there for whoever has a view of them
        self.updates: list[PendingUpdate] = []  # asked for, and not waited for; this rank may have none of them
        self._follow: list[Bucket] = []  # whose values follow when these have taken place
        self._gathering: list[Transfer] = []  # under way
        self._taking_handles = False
        self._not_loaded: set[int] = set()  # slots (by ``id``) that a load has not replaced yet
        self._failed_before: Failure | None = None  # when that load began
        self._watched = False  # values are here, and parameters are guarded all the same: see :meth:`watch`
        self.release()

    def copied(self, of: Callable[[Any], Any], ledger: Ledger, upward: Upward) -> Unit:
        """The same unit once more, around copies of its modules and parameters. Nothing is sent.

        Args:
            of: gives the copy of a module or parameter.
            ledger, upward: of the engine that the copy belongs to.
        """
        self.reconcile()
        self.finish_transfers()
        new = object.__new__(Unit)
        new.__dict__.update(self.__dict__)
        new.module, new.upward = of(self.module), upward
        new.residence = Residence(self.label, released=self.released)
        new.calls_made, new.lingers, new._failure, new._failed_before = 0, False, None, None
        new._watched, new.listener = False, None
        new.updates, new._follow, new._gathering, new._taking_handles = [], [], [], False
        twins = {
            id(b): b.copied([of(p) for p in b.params], ledger, new.reconcile, new.finish_transfers, new.finish_update)
            for b in self.buckets
        }
        new.buckets = [twins[id(b)] for b in self.buckets]
        new.slots = []
        for s in self.slots:
            param = of(s.param)
            mark(param, new, s.bucket.names[s.index])
            holders = [(of(module), name) for module, name in s.holders]
            new.slots.append(Slot(new, twins[id(s.bucket)], s.index, param, list(s.names), holders))
        new.places = {id(s.param): (s.bucket, s.index) for s in new.slots}
        new.unwatched = [s for s in new.slots if not s.bucket.placement.settled]
        if self.released:
            new.residence.to(Residency.RELEASED)
            for b in new.buckets:
                if b.placement.released:
                    guard(b.params)
        return new

    @property
    def params(self) -> list[nn.Parameter]:
        return [s.param for s in self.slots]

    def rename(self, name: str, prefix: str) -> None:
        """A parent's model has taken it over: its name there, and what comes before its parameters' names."""
        self.name = name
        self.label = self.residence.label = f"'{name}'"
        for s in self.slots:
            s.names = [prefix + n for n in s.names]

    @property
    def taking_handles(self) -> bool:
        return self._taking_handles

    @property
    def here(self) -> bool:
        """Can the values be read?"""
        return self.residence.here

    @property
    def updating(self) -> bool:
        """Has an update been asked for that was not waited for, on some rank?"""
        return self.residence.state is Residency.UPDATING

    def slot_of(self, param: nn.Parameter) -> Slot:
        """The slot of one of its parameters."""
        bucket, index = self.places[id(param)]
        return next(s for s in self.slots if s.bucket is bucket and s.index == index)

    @property
    def wire_bytes(self) -> int:
        """Bytes of its gradients, whole, as they cross the wire."""
        if self._wire_bytes is None:
            return sum([b.wire_bytes for b in self.buckets if b.trains])
        return self._wire_bytes

    # --- values ------------------------------------------------------------------------------
    def stage(self) -> None:
        """Begin to bring this rank's shards from their home, ahead of the gather."""
        if self.offloaded and self.residence.state is Residency.RELEASED:
            self.residence.to(Residency.STAGING)
            for b in self.buckets:
                b.stage()

    def start_gather(self) -> None:
        """Begin to bring the values here, unless they are here or on their way.

        Raises:
            UpdateFailed, CheckpointError: they are those of no step: an update failed, or they were loaded in part.
        """
        self.finish_update()
        if self.residence.state in (Residency.GATHERED, Residency.GATHERING):
            return
        with torch.no_grad(), self.upward.announce(Command.GATHER, [self.index]):
            self.comes_with([b.start_gather() for b in self.buckets if b.placement.released])

    def comes_with(self, transfers: Sequence[Transfer]) -> None:
        """Its values are here when these have ended."""
        self.residence.to(Residency.GATHERING)
        self._gathering = list(transfers)

    def gather(self) -> None:
        """Have the values here."""
        if self._failure is not None:
            require_valid(self)
        if self.residence.here:
            if self._watched:
                self._watched = False
                unguard(self.params)
            return
        self.start_gather()
        if self.residence.state is Residency.GATHERING:
            self._arrive()
            self._watched = False
            unguard(self.params)

    def _arrive(self) -> None:
        """Wait for the values that are on their way."""
        transfers, self._gathering = self._gathering, []
        for t in transfers:
            t.wait()
        self.residence.to(Residency.GATHERED)

    def watch(self) -> None:
        """Where values that come and go are here outside of a pass, look at what autograd saves of them.

        The parameters stay guarded then: what is done with them is done with the hooks on that a forward has on.
        """
        pins = self.residence
        in_block = pins.pinned(Pin.READING) or pins.pinned(Pin.WRITING)  # has its hooks on
        if self.released and self.here and not in_block and self.upward.pin_for_access() is None:
            self._watched = True
            guard(self.params)

    def saving(self) -> AbstractContextManager[Any]:
        """Around code whose results autograd may save of values that go away."""
        return self.upward.saving()

    def release(self) -> None:
        """Free the values, where the strategy takes them away and nobody needs them.

        Raises:
            UnitError: the script wrote to them meanwhile, and that cannot reach the master values.
        """
        if not self.released or self.residence.pinned():
            return
        if self.residence.state is Residency.GATHERING:
            self.gather()
        if self.residence.state is Residency.STAGING:
            self.residence.to(Residency.RELEASED)
            for b in self.buckets:
                b.unstage()
        if self.residence.here:
            try:
                self.take_writes()
            except UnitError:
                if any(b.read_only for b in self.buckets):  # what was written is not used again
                    self._let_go()
                raise
            self._let_go()

    def _let_go(self) -> None:
        self.residence.to(Residency.RELEASED)
        self._watched = False
        for b in self.buckets:
            if b.placement.released:
                self.lingers |= not b.release()
                guard(b.params)

    def free(self) -> None:
        """Free the bytes of released values that the script had a view of, if it has none any more."""
        if self.lingers and self.residence.state is Residency.RELEASED:
            freed = [b.release() for b in self.buckets if b.placement.released]
            self.lingers = not all(freed)

    def take_writes(self) -> None:
        """What the script wrote to values that come and go is taken to the master values, before they go.

        Raises:
            UnitError: it cannot be.
        """
        if not self.residence.here or self.residence.pinned(Pin.READING) or self.residence.pinned(Pin.WRITING):
            return  # the end of such a block sees to it
        for b in self.buckets:
            if not b.placement.released or not (written := b.written()):
                continue
            b.note()  # first: taking the values looks at master values, which asks here
            if b.mesh.shard.size > 1:
                raise UnitError(
                    f"parameter '{b.names[written[0]]}' was written to while its values were gathered: each rank would "
                    "keep what it wrote to its own shard, and lose the rest",
                    where=f"unit {self.label}",
                    fix="write inside 'with shardwise.gathered(module, write=True):', after the step (a norm that an "
                    "Embedding keeps with max_norm, for example), or use ddp, zero1 or zero2",
                )
            b.take_values()

    # --- after a step ------------------------------------------------------------------------------
    def publish(self, buckets: Sequence[Bucket]) -> None:
        """After an optimizer step: let the values follow the master values.

        Whole parameters with split optimizer state are gathered while the next forward begins;
        until a unit's bytes are there its parameters are guarded. Those that come and go are simply stale, unless
        somebody has them pinned: then they are gathered anew, in place.
        """
        values_change([self])
        self.prepare_to_follow()
        self.follow_with([b.start_gather() for b in buckets if b.gathers_after_step])

    def prepare_to_follow(self) -> None:
        """The part of :meth:`publish` between :func:`values_change` and the gathers of values that stay."""
        if self.residence.state is Residency.GATHERING:
            self.gather()
        if self.released:
            self._drop_passes()
            self.release()
            if self.residence.here:  # inside gathered(), or unshard(): all ranks are
                with torch.no_grad(), self.upward.announce(Command.GATHER, [self.index]):
                    self.comes_with([b.start_gather() for b in self.buckets if b.placement.released])
                self.gather()
                self.watch()

    def follow_with(self, transfers: Sequence[Transfer]) -> None:
        """The last part of :meth:`publish`: values that stay have followed when these have ended."""
        if transfers:
            self.comes_with(transfers)
            guard(self.params)

    def _drop_passes(self) -> None:
        self.residence.drop(Pin.FORWARD)
        self.residence.drop(Pin.BACKWARD)

    def defer_update(self, updates: Sequence[PendingUpdate], buckets: Sequence[Bucket]) -> None:
        """As :meth:`publish`, of updates that are under way on some rank: :meth:`finish_update` does the rest."""
        if self.residence.state is Residency.GATHERING:
            self.gather()
        values_change([self])
        if self.released:
            self._drop_passes()
            self.release()
        self.residence.to(Residency.UPDATING)
        if not self.released:
            guard(self.params)
        self.updates, self._follow = list(updates), list(buckets)

    def finish_if_pinned(self) -> None:
        """The updates of :meth:`defer_update` have been started: if somebody looks at the values, they follow now."""
        if self.updating and self.residence.pinned():
            self.finish_update()

    def finish_update(self) -> None:
        """Wait for updates that were asked for; then values follow.

        Raises:
            UpdateFailed: one of them failed, or one before: the values are those of no step.
        """
        if self._failure is not None:
            require_valid(self)
        if self.residence.state is not Residency.UPDATING:
            return
        updates, self.updates = self.updates, []
        follow, self._follow = self._follow, []
        for one in updates:
            one.wait()  # if it failed, it marks what it was to change
        pinned = self.released and self.residence.pinned()
        self.residence.to(Residency.RELEASED if self.released and not pinned else Residency.GATHERED)
        if not self.released:
            unguard(self.params)
        with torch.no_grad():
            self.publish(follow)

    # --- failures ------------------------------------------------------------------------------------
    @property
    def failure(self) -> Failure | None:
        """Why the values are those of no step: an update failed, or a load ended half way. Every use raises."""
        return self._failure

    @failure.setter
    def failure(self, failure: Failure | None) -> None:
        self._failure = failure
        settled = failure is not None and failure.look is None  # otherwise an update is under way in this call
        if settled and self.residence.state is not Residency.FAILED:
            if self.residence.staging:
                self.release()
            self.residence.to(Residency.FAILED)
            guard(self.params)
        elif failure is None and self.residence.state is Residency.FAILED:
            for transfer in self._gathering:
                transfer.wait()
            self._gathering = []
            if self.released:
                self.residence.to(Residency.RELEASED)
                for b in self.buckets:
                    if b.placement.released:
                        self.lingers |= not b.release()
            else:
                self.residence.to(Residency.GATHERED)
                unguard(self.params)

    def fail(self, failure: Failure) -> None:
        """Its values are those of no step: nothing uses them before a load is complete. The first cause stays."""
        self.failure = self.failure if self.failure is not None and self.failure.look is None else failure
        self.updates, self._follow = [], []

    def drain(self) -> None:
        """Before a load: no update is under way any more. ``failure`` says whether one failed."""
        with suppress(UpdateFailed, CheckpointError):
            self.finish_update()

    # --- a load through the module -----------------------------------------------------------------------
    def begin_load(self) -> None:
        """``load_state_dict()`` begins: a failure does not stand in the way of it."""
        self._not_loaded = {id(s) for s in self.slots}
        self._failed_before, self.failure = self.failure, None

    def loaded(self, slot: Slot) -> None:
        """The master values of a parameter were replaced."""
        self._not_loaded.discard(id(slot))

    def end_load(self) -> None:
        """It has ended: unless it replaced all of the unit, a failure is what it was."""
        before, self._failed_before = self._failed_before, None
        if self._not_loaded and before is not None:
            self.fail(before)

    def finish_transfers(self) -> None:
        """Before values are read or written past the engine: wait for what is under way since the last step."""
        self.finish_update()
        if self.residence.state is Residency.GATHERING:
            self.gather()

    def reconcile(self) -> None:
        """Before master values or gradients are read or written: updates have taken place, and what the script wrote
        to values that stay has reached them."""
        self.upward.recover()
        if self.settled and any(b.moved() for b in self.buckets):
            self.upward.check()
        self.finish_update()
        self.reconcile_values()

    def reconcile_values(self) -> None:
        """What the script wrote to values goes to the master values, if they are another tensor."""
        if not self.apart:
            return  # they are one tensor
        if self.released:
            self.take_writes()
        for b in self.buckets:
            if not (b.placement.released or b.placement.aliased) and b.written():
                self.finish_transfers()
                b.note()  # first, for the same reason
                b.take_values()

    def rest(self) -> None:
        """No pass needs its values any more."""
        self._drop_passes()
        self.release()

    # --- when somebody reads a parameter ---------------------------------------------------------------
    def access(self, param: nn.Parameter, operation: str, operands: Any = ()) -> None:
        """Somebody uses a guarded parameter: bring the values, if all ranks are here for the same reason.

        Raises:
            ReleasedParameterError: they may not be.
            UpdateFailed: an update failed.
        """
        state = self.residence.state
        require_valid(self)
        if self.residence.here:
            return
        if state is Residency.GATHERING or (state is Residency.UPDATING and not self.released):
            self.gather()
            self.watch()
            return
        pin = self.upward.pin_for_access()
        if pin is None:
            raise refuse(param, operation, self.label)
        self.gather()
        self.residence.pin(pin)

    def detached(self, param: nn.Parameter) -> torch.Tensor | None:
        return None

    def save_in_fp32(self) -> bool:
        self.saved_in_fp32 = not any(b.read_only for b in self.buckets)
        return self.saved_in_fp32

    def is_copied(self, memo: Any) -> bool:
        return self.upward.is_copied(memo)

    # --- for state dicts ---------------------------------------------------------------------------------
    def take_handles(self, on: bool) -> None:
        """While on, ``param.detach()`` of a released parameter is a handle: its shape and its place, no values."""
        self._taking_handles = on

    def full_values(self, bucket: Bucket) -> torch.Tensor:
        """``(parts * n,)`` all values of a bucket in the master dtype, new. Collective where values are split."""
        out = torch.empty(bucket.layout.numel, dtype=bucket.master_dtype, device=bucket.device)
        with bucket.master_here() as master:
            out[bucket.held].copy_(master)
        with self.upward.announce(Command.VALUES, self.index, self.buckets.index(bucket), "values"):
            bucket.mesh.gather(out, bucket.op("state")).wait()
        return out

    def full_grads(self, bucket: Bucket) -> torch.Tensor:
        """``(parts * n,)`` all reduced gradients of a bucket, new. Collective where they are split."""
        out = torch.zeros(bucket.layout.numel, dtype=bucket.master_dtype, device=bucket.device)
        if bucket.grads.there:
            out[bucket.held].copy_(bucket.grads.held())
        if bucket.placement.split_state:
            with self.upward.announce(Command.VALUES, self.index, self.buckets.index(bucket), "gradients"):
                bucket.mesh.gather(out, bucket.op("state")).wait()
        return out


_STATE, _FAILURE = attrgetter("residence.state"), attrgetter("_failure")


def are_here(units: Iterable[Unit]) -> bool:
    """Are the values of all of them here, and those of a step? Asked about all at once, for speed."""
    units = list(units)
    return all(map(is_, map(_STATE, units), repeat(Residency.GATHERED))) and not any(map(_FAILURE, units))


def begin_change(units: Iterable[Unit], failure: Failure) -> None:
    """An update of these units is under way: whoever uses them meanwhile hears of it.

    Args:
        failure: what it has ended in, if nobody says that it has ended.
    """
    for unit in units:
        unit._failure = failure


def end_change(units: Iterable[Unit]) -> None:
    """It has ended."""
    for unit in units:
        if unit.residence.state is Residency.FAILED:
            unit.failure = None
        unit._failure = None


def values_change(units: Sequence[Unit]) -> None:
    """Values are about to change: a graph that saved them before is refused in backward, as torch does.

    What is written to them from here on is the script's, where master values are another tensor.
    """
    with torch._C.DisableTorchFunctionSubclass():
        torch.autograd.graph.increment_version([slot.param for unit in units for slot in unit.slots])
    for b in [b for unit in units if unit.apart for b in unit.buckets]:
        if not b.placement.aliased:
            b.note()


def unit_of(param: Any) -> Unit | None:
    """The unit that answers for a parameter; ``None`` if it is not sharded."""
    owner = getattr(param, "_shardwise_unit", None)
    return owner if isinstance(owner, Unit) else None  # or its values are put aside until it is sharded
