"""``optimizer_in_backward``: a unit is updated as soon as its gradients are reduced, and they are freed at once.

Whole gradients never exist: one or two units' do. The arithmetic is that of ``optimizer.step()``, with the settings
(learning rate, ...) that the optimizer has during the backward; ``step()`` finds nothing left to do but plain
parameters. The read of the next unit's state and the write of the last one's run beside the backward.

The idea is known from LOMO (Lv et al. 2023) and torch's ``_apply_optimizer_in_backward``. What needs all gradients
before the first update (clipping, loss scaling, a mean that is taken afterwards) cannot be had, and raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from shardwise.engine.bucket import Bucket
from shardwise.engine.failure import Failure, Fallible, require_valid
from shardwise.engine.offload import OptimizerShard, update
from shardwise.engine.optimizer_state import wait_for_readers
from shardwise.engine.unit import Unit
from shardwise.errors import OptimizerError, UnitError


class _Job(NamedTuple):
    """A bucket's update by one optimizer: the places of its parameters, per group."""

    optimizer: Optimizer
    shard: OptimizerShard
    places: list[list[int]]


class InBackward:
    """The updates of one model's backwards.

    Args:
        shard_of: gives what an optimizer keeps of a bucket.

    Attributes:
        optimizers: those that were attached.
    """

    def __init__(self, shard_of: Callable[[Optimizer, Bucket], OptimizerShard]) -> None:
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self._shard_of = shard_of
        self._jobs: dict[int, list[_Job]] = {}
        self._order: list[Bucket] = []  # of the last backward, to read ahead
        self._done: list[Bucket] = []

    def for_copy(self) -> InBackward:
        """The same for a copy of the model, whose optimizers are its own."""
        return InBackward(self._shard_of)

    def begin(self, units: Sequence[Unit]) -> None:
        """A backward begins.

        Raises:
            OptimizerError: no optimizer is known that holds this model's parameters.
            UpdateFailed: an update of one that is known failed, and its state was not loaded since.
        """
        self._jobs.clear()
        self._order, self._done = self._done, []
        places = {id(s.param): (s.bucket, s.index) for u in units for s in u.slots}
        for optimizer in self.optimizers:
            found: dict[int, tuple[Bucket, list[list[int]]]] = {}
            for g, group in enumerate(optimizer.param_groups):
                for p in group["params"]:
                    if id(p) in places:
                        bucket, index = places[id(p)]
                        mine = found.setdefault(id(bucket), (bucket, [[] for _ in optimizer.param_groups]))
                        mine[1][g].append(index)
            for key, (bucket, per_group) in found.items():
                shard = self._shard_of(optimizer, bucket)
                require_valid(shard.owner)
                self._jobs.setdefault(key, []).append(_Job(optimizer, shard, per_group))
        if not self._jobs:
            raise OptimizerError(
                "optimizer_in_backward needs to know the optimizer before the first backward",
                fix="call shardwise.attach(optimizer), or Accelerator.prepare(model, optimizer)",
            )

    def did(self, unit: Unit) -> bool:
        """Was the unit updated in this backward?"""
        return any(bucket in self._done for bucket in unit.buckets)

    def refuse_more(self, unit: Unit, name: str) -> None:
        """Raise if a gradient arrives after its unit's update."""
        if self.did(unit):
            raise UnitError(
                f"parameter '{name}' got a second gradient in one backward, after its update",
                where=f"unit {unit.label}",
                fix="leave optimizer_in_backward out, or use checkpoint(..., use_reentrant=False)",
            )

    @torch.no_grad()
    def update(self, unit: Unit, used: set[int], *, final: bool = False) -> None:
        """Update a unit whose gradients are reduced.

        Args:
            used: parameters (by ``id``) that got a gradient: on some rank if ``final``, else on this one. Then a unit
                is updated if every trainable parameter got one, and otherwise waits for the end of the backward.
        """
        for bucket in unit.buckets:
            if bucket in self._done or bucket.grads.reduced is None:
                continue
            trainable = [i for i, p in enumerate(bucket.params) if p.requires_grad]
            mine = {i for i in trainable if id(bucket.params[i]) in used}
            if final or len(mine) == len(trainable):
                self._update(bucket, mine)

    def _update(self, bucket: Bucket, used: set[int]) -> None:
        self._done.append(bucket)
        self._read_ahead(bucket)
        for job in self._jobs.get(id(bucket), ()):
            wait_for_readers(job.optimizer)
            pieces: list[list[torch.Tensor]] = []
            remote: list[torch.Tensor] = []
            for places in job.places:
                pieces.append([])
                for index in places:
                    held = bucket.piece_params[index]
                    pieces[-1] += held
                    if index not in used:
                        continue
                    if bucket.placement.grads_cross:
                        remote += held
                    else:
                        for piece, grad in zip(held, bucket.grads.pieces(index), strict=True):
                            piece.grad = grad
            whole = [group["params"] for group in job.optimizer.param_groups]
            try:
                try:
                    with job.shard.owner.depth.nested():
                        update(job.optimizer, job.shard, pieces, remote)
                finally:
                    job.shard.cancel()
                    for group, params in zip(job.optimizer.param_groups, whole, strict=True):
                        group["params"] = params
                    for piece in (p for ps in pieces for p in ps):
                        piece.grad = None
            except BaseException as error:
                job.shard.fail(error)
                raise
        bucket.grads.spend()

    def _read_ahead(self, bucket: Bucket) -> None:
        """Start to read what the bucket after this one keeps at home, if the last backward tells which that is."""
        at = self._order.index(bucket) if bucket in self._order else -1
        if 0 <= at < len(self._order) - 1 and (bucket.home is None or bucket.home.buffers > 1):
            for job in self._jobs.get(id(self._order[at + 1]), ())[:1]:
                if job.shard.bucket not in self._done:
                    job.shard.begin(grads=False)

    def end(self, units: Sequence[Unit]) -> None:
        """The backward is over: what was read ahead in vain is forgotten, and values follow. Collective."""
        self._cancel()
        for unit in units:
            if buckets := [b for b in unit.buckets if b in self._done]:
                unit.publish(buckets)

    def abandon(self, units: Sequence[Unit]) -> None:
        """The backward failed. If some units had been updated, the model is neither that of this step nor of the next.

        Args:
            units: the model's, which are marked then.
        """
        self._cancel()
        done, self._done = self._done, []
        if done:
            names = {type(job.optimizer).__name__ for jobs in self._jobs.values() for job in jobs}
            failure = Failure(
                f"the last backward failed when {len(done)} of its updates by {' and '.join(sorted(names))} had taken "
                "place (optimizer_in_backward), so the values are those of no step",
                f"units {units[0].label} to {units[-1].label}",
                "load a checkpoint into the model and its optimizer: "
                "shardwise.checkpoint.load(path, models=[model], optimizers=[optimizer])",
            )
            owners = {id(job.shard.owner): job.shard.owner for jobs in self._jobs.values() for job in jobs}
            holders: list[Fallible] = [*units, *owners.values()]
            for holder in holders:
                holder.failure = holder.failure or failure

    def _cancel(self) -> None:
        for jobs in self._jobs.values():
            for job in jobs:
                job.shard.cancel()
