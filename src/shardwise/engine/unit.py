"""A unit: the module subtree whose parameters are gathered, released and reduced together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardwise.comm.mesh import Mesh
from shardwise.engine.bucket import Bucket
from shardwise.engine.failure import Failure, require_valid
from shardwise.engine.guard import guard, mark, refuse, unguard
from shardwise.errors import CheckpointError, UnitError, UpdateFailed
from shardwise.strategy import Strategy
from shardwise.tiers import Ledger
from shardwise.tiers.home import Home
from shardwise.tiers.transfer import Transfer

if TYPE_CHECKING:
    from shardwise.engine.deferred_update import DeferredUpdate
    from shardwise.engine.schedule import Engine


class Call:
    """One forward of a unit under autograd: which of its inputs still wait for their gradients.

    A frozen parameter may be needed until the last input gradient of its call is computed; a
    trainable one until its own gradient arrives. Only units with frozen parameters look at calls.
    """

    __slots__ = ("inputs", "unit")

    def __init__(self, unit: Unit) -> None:
        self.unit, self.inputs = unit, 0

    def input_ready(self, _grad: torch.Tensor) -> None:
        self.inputs -= 1
        if self.inputs == 0 and self in self.unit.calls:
            self.unit.calls.discard(self)
            self.unit.check_complete()


class Unit:
    """Buckets of one module subtree and their state. Which unit does what when is the engine's.

    Args:
        name: full name of ``module`` in the sharded model.
        module: the subtree; its hooks drive the unit.
        params: parameters it answers for, each with all its full names (tied ones have several).
        home: of what the strategy offloads; ``None`` if that is nothing.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        module: nn.Module,
        params: Sequence[tuple[nn.Parameter, list[str]]],
        mesh: Mesh,
        strategy: Strategy,
        ledger: Ledger,
        home: Home | None = None,
    ) -> None:
        self.engine, self.name, self.module = engine, name, module
        self.mesh, self.strategy, self.home = mesh, strategy, home
        self.index = 0
        self.label = f"'{name}'" if name else "'(root)'"
        kinds: dict[tuple[torch.dtype, bool], list[tuple[nn.Parameter, list[str]]]] = {}
        for p, names in params:
            kinds.setdefault((p.dtype, p.requires_grad), []).append((p, names))
        self.buckets: list[Bucket] = []
        self.slots: list[tuple[Bucket, int, nn.Parameter]] = []
        self.names: dict[int, list[str]] = {}
        for members in kinds.values():
            tensors = [p for p, _ in members]
            bucket = Bucket(self.label, tensors, [names[0] for _, names in members], mesh, strategy, ledger, home)
            self.buckets.append(bucket)
            for i, (p, names) in enumerate(members):
                mark(p, self, names[0])
                self.slots.append((bucket, i, p))
                self.names[id(p)] = names
        self.places = {id(p): (b, i) for b, i, p in self.slots}
        self.split = any(b.split for b in self.buckets)
        self.away = any(b.params_away for b in self.buckets)
        # By a weak reference: the collector cannot look into autograd, and a dropped model would live for ever.
        me = weakref.ref(self)
        self._arrivals: list[Callable[[nn.Parameter], None]] = [
            partial(_arrived, me, k) for k in range(len(self.slots))
        ]
        self._hooked = [False] * len(self.slots)
        self.has_frozen = False
        self.watch_trainable()
        self.failure: Failure | None = None  # an update of it failed, or a load into it: every use raises
        self.gathered = True
        self.staged = False
        self.updates: list[DeferredUpdate] = []  # asked for, and not waited for
        # Its next gather begins behind the computation of the unit before it. On all ranks alike, since they gather in
        # one order; ``updates`` are not: a rank that holds nothing of what is updated has none.
        self.behind = False
        self._owed: list[Bucket] = []  # whose values will have to follow
        self.gathering: list[Transfer] | None = None
        self.kept_for: set[str] = set()  # stay gathered until the end of this "forward", "backward" or "reading"
        self.handles: list[Any] = []
        self.call: Call | None = None
        self.reading_state = False  # inside state_dict()
        # --- within one backward
        self.backward_id = -1
        self.pending = 0
        self.calls: set[Call] = set()
        self.release()

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for _, _, p in self.slots]

    # --- values ------------------------------------------------------------------------------
    def stage(self) -> None:
        """Begin to bring this rank's shards from their home, ahead of the gather."""
        if self.away and not self.gathered and self.gathering is None and not self.updates:
            self.staged = True
            for b in self.buckets:
                b.stage()

    def start_gather(self) -> None:
        """Begin to bring the values here, unless they are here or on their way."""
        self.catch_up()
        self.behind = False
        if self.gathered or self.gathering is not None:
            return
        with torch.no_grad(), self.engine.told("gather", self.index):
            self.staged = False
            self.gathering = [b.start_gather() for b in self.buckets if b.split]

    def gather(self) -> None:
        """Have the values here."""
        require_valid(self)
        if self.gathered:
            return
        self.start_gather()
        self._end_gather()

    def _end_gather(self) -> None:
        transfers, self.gathering = self.gathering, None
        if transfers is None:
            return  # they were here, as soon as an update had taken place
        for t in transfers:
            t.wait()
        self.gathered = True
        unguard(self.params)

    def release(self) -> None:
        """Free the values, where the strategy splits them."""
        if not self.split or self.kept_for:
            return
        if self.gathering is not None:
            self._end_gather()
        if self.staged:
            self.staged = False
            for b in self.buckets:
                b.unstage()
        if self.gathered:
            self.gathered = False
            for b in self.buckets:
                if b.split:
                    b.flat.release()
                    guard(b.params)

    def publish(self, buckets: Sequence[Bucket]) -> None:
        """After an optimizer step: let the values follow the master values.

        Whole parameters with split optimizer state are gathered while the next forward begins;
        until a unit's bytes are there its parameters are guarded. Split ones are simply stale.
        """
        if self.gathering is not None:
            self.gather()
        if self.split:
            self.kept_for.clear()
            self.release()
        transfers = [b.start_gather() for b in buckets if not b.split and (not b.aliased or b.split_optimizer)]
        if transfers:
            self.gathering = transfers
            self.gathered = False
            guard(self.params)

    def postpone(self, updates: Sequence[DeferredUpdate], buckets: Sequence[Bucket]) -> None:
        """As :meth:`publish`, of updates that are under way: :meth:`catch_up` does the rest."""
        if self.gathering is not None:
            self.gather()
        if self.split:
            self.kept_for.clear()
            self.release()
        else:
            self.gathered = False
            guard(self.params)
        self.updates, self._owed = list(updates), list(buckets)

    def catch_up(self) -> None:
        """Wait for updates that were asked for; then values follow.

        Raises:
            UpdateFailed: one of them failed, or one before.
        """
        require_valid(self)
        if not self.updates:
            return
        updates, self.updates = self.updates, []
        owed, self._owed = self._owed, []
        for one in updates:
            one.wait()
        if not self.split:
            self.gathered = True
            unguard(self.params)
        with torch.no_grad():
            self.publish(owed)

    def fail(self, failure: Failure) -> None:
        """Its values are those of no step: nothing uses them before a load is complete."""
        self.failure = self.failure or failure
        self.updates, self._owed = [], []

    def drain(self) -> None:
        """Before a load: no update is under way any more. ``failure`` says whether one failed."""
        with suppress(UpdateFailed, CheckpointError):
            self.catch_up()

    def settle(self) -> None:
        """Before values are read or written past the engine: wait for what is under way since the last step."""
        self.catch_up()
        if self.gathering is not None:
            self.gather()

    def touch(self, param: nn.Parameter, operation: str) -> None:
        """Somebody uses a guarded parameter: bring the values, if all ranks are here for the same reason."""
        require_valid(self)
        if self.gathering is not None or (self.updates and not self.split):
            self.gather()
        elif self.engine.forward_active or self.engine.backward_active:
            self.gather()
            self.kept_for.add("backward" if torch.is_grad_enabled() or self.engine.backward_active else "forward")
        else:
            raise refuse(param, operation, self.label)

    # --- gradients -----------------------------------------------------------------------------
    def watch_trainable(self) -> None:
        """Follow parameters that were frozen or unfrozen since the last look."""
        frozen = False
        for k, (_, _, p) in enumerate(self.slots):
            if not p.requires_grad:
                frozen = True
            elif not self._hooked[k]:
                p.register_post_accumulate_grad_hook(self._arrivals[k])
                self._hooked[k] = True
        self.has_frozen = frozen

    def begin_backward(self, backward_id: int) -> None:
        if self.backward_id != backward_id:
            self.backward_id = backward_id
            self.calls.clear()
            self.pending = sum(1 for _, _, p in self.slots if p.requires_grad)
            for b in self.buckets:
                b.grads.read_flags()

    def _arrived(self, bucket: Bucket, index: int, param: nn.Parameter) -> None:
        engine = self.engine
        if self.backward_id != engine.backward_id or not engine.backward_active:
            # Gradients without a backward through this unit's outputs: the parameter was used directly.
            engine.begin_backward()
            fresh, param.grad = param.grad, None
            self.begin_backward(engine.backward_id)
            param.grad = fresh
        if engine.in_backward is not None:
            engine.in_backward.refuse_more(self, bucket.names[index])
        engine.launch_ready()
        grad = param.grad
        param.grad = None
        assert grad is not None
        if grad.is_sparse:
            raise UnitError(
                f"parameter '{bucket.names[index]}' has a sparse gradient, which has no flat layout",
                where=f"unit {self.label}",
                fix="build the embedding with sparse=False",
            )
        with torch.no_grad():
            bucket.grads.arrive(index, grad.detach())
        self.pending -= 1
        if self.pending == 0:
            self.check_complete()

    def check_complete(self) -> None:
        """Every gradient this backward will make here is made, and nobody needs the values any more."""
        if self.pending > 0 or (self.has_frozen and self.calls):
            return
        self.engine.unit_done(self)

    @property
    def any_arrived(self) -> bool:
        return any(any(b.grads.arrived) for b in self.buckets)


def _arrived(unit: weakref.ref[Unit], slot: int, param: nn.Parameter) -> None:
    found = unit()
    if found is not None:
        bucket, index, _ = found.slots[slot]
        found._arrived(bucket, index, param)
