"""What the engine remembers of one optimizer: what its groups hold at the moment, and what became of its last step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from itertools import compress, repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.engine import deferred_update
from shardwise.engine.bucket import Bucket
from shardwise.engine.deferred_update import DeferredStep
from shardwise.engine.failure import Failure, require_valid
from shardwise.engine.offload import CallDepth, OptimizerShard
from shardwise.engine.unit import Unit, are_here, begin_change, end_change, unit_of
from shardwise.errors import OptimizerError

_VERSION = attrgetter("_version")


class Phase(Enum):
    """What ``param_groups`` hold."""

    PARAMETERS = "the model's parameters"
    PIECES = "this rank's pieces, for as long as a call takes"
    UPDATING = "the pieces, and the optimizer's own step is changing them"


class Attachment:
    """The engine's record of one optimizer.

    Args:
        optimizer: is not kept alive.

    Attributes:
        phase: what its groups hold.
        failure: an update failed; nothing uses the optimizer until its state is loaded.
        depth: calls of its step that are under way, one inside the other.
        calls: those that came through the instance's own ``step``, which mends an exchange when they fail.
        steps: that have ended.
        originals: what the groups held before the exchange.
        pieces: what they hold since.
        remote: pieces (by ``id``) whose gradients are on the other side of the link.
        deferred: the updates of the step under way that take place later.
        shards: by ``id`` of the bucket.
        hooks: ids of the hooks before and after its own step.
        bare: ``state_dict()`` leaves what is on a disk there.
        all_given: all pieces have gradients, in the step under way.
        counted: pieces whose state is in the ledger.
        counted_entries: of ``optimizer.state``, when the ledger was told last.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._known: _Known | None = None
        self._lent: list[Bucket] = []  # whose pieces have gradients for as long as a call takes
        self._written: list[torch.Tensor] = []  # pieces and state, when an update began
        self.phase = Phase.PARAMETERS
        self.failure: Failure | None = None
        self.depth = CallDepth()
        self.calls = 0
        self.steps = 0
        self.originals: list[list[nn.Parameter]] = []
        self.pieces: list[list[tuple[torch.Tensor, Bucket | None]]] = []
        self.remote: set[int] = set()
        self.deferred: DeferredStep | None = None
        self._before_update: list[int] = []
        self.all_given = False
        self._updating: list[Unit] = []
        self.shards: dict[int, OptimizerShard] = {}
        self.hooks = (-1, -1)
        self.bare = False
        self.counted: set[int] = set()
        self.counted_entries = 0

    # --- parameters and pieces ---------------------------------------------------------------
    @property
    def optimizer(self) -> Optimizer:
        found = self._optimizer()
        assert found is not None, "it is asked for while somebody uses it"
        return found

    @property
    def params(self) -> Iterator[nn.Parameter]:
        """The model's parameters, whatever the groups hold."""
        if self.phase is Phase.PARAMETERS:
            return (p for group in self.optimizer.param_groups for p in group["params"])
        return (p for params in self.originals for p in params)

    @property
    def known(self) -> _Known:
        """Where its parameters are. Looked up again when the groups hold others, or more of them were sharded."""
        found = self._known
        if self.phase is not Phase.PARAMETERS and found is not None:
            return found  # what it was when they were exchanged
        groups = [group["params"] for group in self.optimizer.param_groups]
        if found is None or not found.holds(groups):
            found = self._known = _Known(groups)
        return found

    @property
    def units(self) -> list[Unit]:
        return self.known.units

    @property
    def buckets(self) -> list[Bucket]:
        return self.known.buckets

    def finish_updates(self) -> None:
        """Wait for updates that were asked for, and for what the script wrote to reach the master values."""
        known = self.known
        for engine in {id(unit.upward): unit.upward for unit in known.units}.values():
            engine.recover()
            if known.moving:  # what is settled is updated wherever it is
                engine.check()
        if known.apart or not are_here(known.moving):
            for unit in known.moving:
                if unit.apart or unit.updating or unit.failure is not None:
                    unit.reconcile()

    def exchange(self, *, grads: bool = False, loading: bool = False) -> None:
        """Parameters out, pieces in.

        Args:
            grads: with their gradients. Those on the other side of the link come when it is their turn.
            loading: for the sake of a load, which is what follows a failure.

        Raises:
            UpdateFailed: an earlier update failed.
            GradientError: gradients have not been reduced yet.
        """
        self.restore()  # what a call left open that ended in an exception
        if loading:
            for unit in self.units:
                unit.drain()
        else:
            require_valid(self)
            self.finish_updates()
        groups, known = self.optimizer.param_groups, self.known
        if grads:
            self._give_grads(known)
        self.originals, self.phase = [list(g["params"]) for g in groups], Phase.PIECES
        self.pieces = known.pieces
        for group, held in zip(groups, known.held, strict=True):
            group["params"] = list(held)

    def _give_grads(self, known: _Known) -> None:
        """Give pieces their gradients. Most have them: those of the step before, in the same memory."""
        shown = known.shown()
        self.all_given = known.are_given(shown)
        if self.all_given:
            return
        for bucket in known.listened:
            plan, grads = bucket.placement, bucket.grads
            found = grads.all_for_step()
            if grads.given is found:
                continue
            for held, mine in zip(bucket.piece_params, found, strict=True):
                if mine is not None and plan.grads_cross:
                    self.remote.update(id(piece) for piece in held)
                for k, piece in enumerate(held):
                    piece.grad = None if mine is None or plan.grads_cross else mine[k]
            stays = not (plan.steps_apart or grads.split)  # in the same memory
            grads.given = found if stays else None
            if not stays:
                self._lent.append(bucket)
        known.note_given()

    def restore(self) -> None:
        """Pieces out, parameters in."""
        for bucket in self._lent:
            for piece in (piece for held in bucket.piece_params for piece in held):
                piece.grad = None
        self._lent.clear()
        if self.phase is not Phase.PARAMETERS:
            for group, params in zip(self.optimizer.param_groups, self.originals, strict=False):  # one may be new
                group["params"] = params
            self.phase = Phase.PARAMETERS
        self.originals, self.pieces = [], []
        self.remote.clear()

    def shard_of(self, bucket: Bucket) -> OptimizerShard:
        """What the optimizer keeps of a bucket; made when first asked for."""
        shard = self.shards.get(id(bucket))
        if shard is None:
            shard = self.shards[id(bucket)] = OptimizerShard(bucket, type(self.optimizer).__name__, self)
        return shard

    # --- failures ----------------------------------------------------------------------------
    def begin_update(self) -> None:
        """The optimizer's own step is about to run. Until :meth:`end_update`, it has failed as far as anybody knows.

        Nobody tells us if the very first one ends in an exception: it was called before the instance had a ``step`` of
        its own.
        """
        self.phase = Phase.UPDATING
        name, units = type(self.optimizer).__name__, self.units
        self._updating = units
        self._written = self._changing()
        self._before_update = list(map(_VERSION, self._written))
        self.failure = Failure.of_update(name, _where(units), look=self.look)
        begin_change(units, self.failure)

    def _changing(self) -> list[torch.Tensor]:
        """What the optimizer's own step writes to: pieces, and their state.

        Torch's own optimizers write first to the first piece of a kind that has a gradient, or to its state: as long
        as that is as it was, all are.
        """
        state, out = self.optimizer.state, []
        pieces: Iterable[torch.Tensor] = (p for group in self.optimizer.param_groups for p in group["params"])
        if deferred_update.is_plain(self.optimizer) and not self.known.with_home:
            of_kind = (next((p for p in kind if p.grad is not None), None) for kind in self.known.kinds)
            pieces = [p for p in of_kind if p is not None]
        for piece in pieces:
            out.append(piece)
            mine = dict.get(state, piece)  # not through what refuses parameters
            if mine:
                out += [v for v in mine.values() if isinstance(v, torch.Tensor)]
        return out

    def _has_changed(self) -> bool:
        """Since an update began, has something been written to, or replaced?"""
        now = self._changing()
        same = len(now) == len(self._written) and all(map(is_, now, self._written))
        return not same or list(map(_VERSION, now)) != self._before_update

    def interrupted(self, error: BaseException) -> None:
        """A call ended in an exception: mend the groups. If an update had begun to change something, it has failed."""
        if self.phase is Phase.UPDATING and self._has_changed():
            self.fail(error)
        self.end_update()
        for bucket in self.known.buckets:
            bucket.grads.given = None
        self.restore()

    def look(self) -> None:
        """Somebody uses what an update is changing that has not ended: nobody mended it. Has anything changed?

        ``zero_grad()`` may have met the pieces since; it was meant for the parameters.
        """
        if self.phase is Phase.UPDATING:
            params, pieces = list(self.params), [p for group in self.optimizer.param_groups for p in group["params"]]
            zeroed = bool(pieces) and all(piece.grad is None for piece in pieces)
            self.interrupted(RuntimeError("the optimizer's first step ended in an exception"))
            self.depth.value = 0
            for p in params if zeroed else ():
                p.grad = None

    def end_update(self) -> None:
        """It has ended without an exception, or before it changed anything."""
        if self.phase is Phase.UPDATING:
            self.phase, self.failure = Phase.PIECES, None
            end_change(self._updating)
            self._updating = []

    def fail(self, error: BaseException, where: str = "") -> Failure:
        """An update failed. The first cause stays.

        Args:
            where: the unit, if it is known.
        """
        self.end_update()
        units = self.units
        if self.failure is None:
            self.failure = Failure.of_update(type(self.optimizer).__name__, where or _where(units), error)
        for unit in units:
            unit.fail(self.failure)
        return self.failure


class _Known:
    """Where the parameters of an optimizer's groups are.

    Attributes:
        places: per group and parameter, its bucket and index there; ``None``: it is not sharded.
        pieces: per group, what this rank holds of them, and of which bucket it is; ``held``: without that.
        units, buckets: theirs; units in the order of their model. ``moving``: units that are not settled;
            ``listened``: buckets that are not; ``changes``: both.
        apart: values of some unit are another tensor than the master values.
        kinds: what this rank holds, by group, dtype and device.
        given: what :meth:`shown` returned when pieces got gradients to keep; empty: some did not.
        with_home: some of them are updated at a home of their own.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self._params = [list(params) for params in groups]
        self.places = [[place_of(p) for p in params] for params in self._params]
        self.pieces: list[list[tuple[torch.Tensor, Bucket | None]]] = []
        buckets: dict[int, Bucket] = {}
        for params, places in zip(self._params, self.places, strict=True):
            self.pieces.append([])
            for p, place in zip(params, places, strict=True):
                if place is None:
                    self.pieces[-1].append((p, None))
                    continue
                bucket, index = place
                self.pieces[-1] += [(piece, bucket) for piece in bucket.piece_params[index]]
                buckets[id(bucket)] = bucket
        self.held = [[piece for piece, _ in pieces] for pieces in self.pieces]
        kinds: dict[Any, list[torch.Tensor]] = {}
        for k, pieces in enumerate(self.held):
            for piece in pieces:
                kinds.setdefault((k, piece.dtype, piece.device), []).append(piece)
        self.kinds = list(kinds.values())
        self.units = units_of(p for params in self._params for p in params)
        self.moving = [unit for unit in self.units if not unit.settled]
        self.apart = any(unit.apart for unit in self.moving)
        self.buckets = list(buckets.values())
        self.listened = [b for b in self.buckets if not b.placement.settled]
        self._shown = [p for b in self.listened for p in b.params]
        self.given: list[Any] = []
        self._moving_params = [
            (place, p)
            for params, places in zip(self._params, self.places, strict=True)
            for p, place in zip(params, places, strict=True)
            if place is not None and not place[0].placement.settled
        ]
        self.changes = [(u, mine) for u in self.moving if (mine := [b for b in u.buckets if id(b) in buckets])]
        self.with_home = any(b.home is not None for b in self.buckets)
        self._loose = [
            p
            for params, places in zip(self._params, self.places, strict=True)
            for p, place in zip(params, places, strict=True)
            if place is None
        ]

    def shown(self) -> list[Any]:
        """What ``p.grad`` shows of each parameter of the buckets that are not settled."""
        with torch._C.DisableTorchFunctionSubclass():  # of parameters that are released
            return [p.grad for p in self._shown]

    def are_given(self, shown: Sequence[Any]) -> bool:
        """Is that what pieces have got to keep, and is it reduced once more?"""
        return (
            len(shown) == len(self.given)
            and all(map(is_, shown, self.given))
            and all(b.grads.are_given for b in self.listened)
        )

    def note_given(self) -> None:
        """Pieces have got their gradients. Of those that they keep, remember which these are."""
        self.given = self.shown() if all(b.grads.are_given for b in self.listened) else []

    def with_gradients(self) -> list[tuple[Unit, list[Bucket]]]:
        """Units and buckets that are not settled, of which a parameter in the groups has a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            there = list(map(is_not, [p.grad for _, p in self._moving_params], repeat(None)))
        if all(there):
            return self.changes
        found = {id(b) for (b, _), _ in compress(self._moving_params, there)}
        return [(unit, some) for unit, all_ in self.changes if (some := [b for b in all_ if id(b) in found])]

    def holds(self, groups: Sequence[Sequence[Any]]) -> bool:
        """Is this about these groups, and still so?"""
        return (
            len(groups) == len(self._params)
            and all(len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(groups, self._params, strict=True))
            and all(unit_of(p) is None for p in self._loose)
        )


def _where(units: list[Unit]) -> str:
    """Empty: the optimizer steps inside another one, which has exchanged the parameters they share."""
    labels = [unit.label for unit in units]
    if len(labels) < 2:
        return f"unit {labels[0]}" if labels else ""
    return f"units {labels[0]} to {labels[-1]}"


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Whoever steps. A wrapper that left out ``Optimizer.__init__`` (the Accelerator's) only passes calls on."""
    while "_optimizer_step_pre_hooks" not in vars(optimizer) and isinstance(
        inner := vars(optimizer).get("optimizer"), Optimizer
    ):
        optimizer = inner
    return optimizer


_ATTRIBUTE = "_shardwise_attachment"


def attachment_of(optimizer: Optimizer) -> Attachment | None:
    """The record of an optimizer, or of the one that it wraps; ``None`` if it is not attached.

    An attribute of the instance: the record knows buckets and updates, and whoever knows those may know the optimizer.
    Such a circle the collector can see; a table of them it could not.
    """
    found: Attachment | None = vars(unwrapped(optimizer)).get(_ATTRIBUTE)
    return found


def require_attachment(optimizer: Optimizer) -> Attachment:
    """The record of an attached optimizer."""
    found = attachment_of(optimizer)
    assert found is not None
    return found


def remember(optimizer: Optimizer) -> Attachment:
    """Make the record of an optimizer."""
    record = vars(optimizer)[_ATTRIBUTE] = Attachment(optimizer)
    return record


def units_of(params: Iterable[nn.Parameter]) -> list[Unit]:
    """The units of parameters, in the order of their model."""
    found = {id(u): u for p in params if (u := unit_of(p)) is not None}
    return sorted(found.values(), key=lambda unit: unit.index)


def place_of(param: nn.Parameter) -> tuple[Bucket, int] | None:
    """A parameter's bucket and its index there; ``None`` if it is not sharded.

    Raises:
        OptimizerError: its unit has another parameter in its place.
    """
    unit = unit_of(param)
    if unit is None:
        return None
    place = unit.places.get(id(param))
    if place is None:
        raise OptimizerError(
            f"the optimizer holds parameter '{param._shardwise_name}' which its unit no longer has",  # type: ignore[attr-defined]
            where=f"unit {unit.label}",
            fix="build the optimizer from model.parameters() again",
        )
    return place
