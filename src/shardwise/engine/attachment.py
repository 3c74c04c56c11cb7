"""What the engine remembers of one optimizer: what its groups hold at the moment, and what became of its last step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from enum import Enum

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.engine.bucket import Bucket
from shardwise.engine.deferred_update import DeferredStep
from shardwise.engine.failure import Failure, require_valid
from shardwise.engine.offload import CallDepth, OptimizerShard
from shardwise.engine.unit import Unit, unit_of
from shardwise.errors import OptimizerError


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
        counted: pieces whose state is in the ledger.
        counted_entries: of ``optimizer.state``, when the ledger was told last.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
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
    def units(self) -> list[Unit]:
        return units_of(self.params)

    @property
    def buckets(self) -> list[Bucket]:
        found = (place_of(p) for p in self.params)
        return list({id(place[0]): place[0] for place in found if place is not None}.values())

    def finish_updates(self) -> None:
        """Wait for updates that were asked for."""
        units = self.units
        for engine in {id(unit.upward): unit.upward for unit in units}.values():
            engine.recover()
            engine.check()
        for unit in units:
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
        groups = self.optimizer.param_groups
        originals = [list(g["params"]) for g in groups]
        for params in originals:
            self.pieces.append([])
            for p in params:
                self.pieces[-1] += self._pieces(p, grads)
        self.originals, self.phase = originals, Phase.PIECES
        for group, pieces in zip(groups, self.pieces, strict=True):
            group["params"] = [piece for piece, _ in pieces]

    def _pieces(self, param: nn.Parameter, grads: bool) -> list[tuple[torch.Tensor, Bucket | None]]:
        place = place_of(param)
        if place is None:
            return [(param, None)]
        bucket, index = place
        held = bucket.piece_params[index]
        if grads:
            found = bucket.grads.for_step(index) if param.requires_grad else None
            for k, piece in enumerate(held):
                piece.grad = None if found is None or bucket.placement.grads_cross else found[k]
            if found is not None and bucket.placement.grads_cross:
                self.remote.update(id(piece) for piece in held)
        return [(piece, bucket) for piece in held]

    def restore(self) -> None:
        """Pieces out, parameters in."""
        for piece, bucket in (pair for pieces in self.pieces for pair in pieces):
            if bucket is not None:
                piece.grad = None
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
        self._before_update = self._versions()
        self.failure = Failure.of_update(name, _where(units), look=self.look)
        for unit in units:
            unit.failure = self.failure

    def _versions(self) -> list[int]:
        """Numbers that grow when what the optimizer's own step works on is written to."""
        state, out = self.optimizer.state, [len(self.optimizer.state)]
        for piece in (p for group in self.optimizer.param_groups for p in group["params"]):
            out.append(piece._version)
            out += [v._version for v in state.get(piece, {}).values() if isinstance(v, torch.Tensor)]
        return out

    def interrupted(self, error: BaseException) -> None:
        """A call ended in an exception: mend the groups. If an update had begun to change something, it has failed."""
        if self.phase is Phase.UPDATING and self._versions() != self._before_update:
            self.fail(error)
        self.end_update()
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
            for unit in self._updating:
                unit.failure = None
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
