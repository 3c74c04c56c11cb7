"""Updates that ``optimizer.step()`` asks for and the next forward waits for, unit by unit.

With clipping, no unit can be updated before all gradients are there. What can be hidden then is the update itself,
behind the next forward: ``step()`` hands updates to a thread (torch's kernels and the disk's threads run without the
interpreter's lock) and returns; the forward waits for a unit's update when it reaches the unit, and a gather of the
next unit begins after the unit before it has been told to compute. The arithmetic is the same, in the same order per
unit, with the settings (learning rate, ...) that the optimizer had at ``step()``.

Whatever else looks at values, state or gradients first waits too (:meth:`shardwise.engine.unit.Unit.finish_update`).
Units whose values are whole on each rank while the optimizer state is split are updated at once: their gather has to
begin in ``step()``, because what comes next may run on one rank only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer

from shardwise import device as devices
from shardwise import events
from shardwise.engine.bucket import Bucket
from shardwise.engine.elementwise import step_class
from shardwise.engine.offload import OptimizerShard, Pieces, pieces_of, settings_of, update
from shardwise.tiers.home import Home
from shardwise.tiers.planned import without_values

_threads: WeakKeyDictionary[Home, ThreadPoolExecutor] = WeakKeyDictionary()


def _thread(home: Home) -> ThreadPoolExecutor:
    """Where updates of what lives at a home take place. One, so that they keep their order and share its buffers."""
    thread = _threads.get(home)
    if thread is None:
        thread = _threads[home] = ThreadPoolExecutor(1, thread_name_prefix="shardwise-updates")
    return thread


class DeferredStep:
    """The updates that one ``step()`` has put off.

    Args:
        optimizer: with the settings of now. Later changes of them are not this step's.

    Attributes:
        updates: by ``id`` of the bucket, in the order in which they take place.
        failed: the first that did not take place, and why. Those after it do not begin: they would only hide why.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = snapshot(optimizer)
        self.updates: dict[int, DeferredUpdate] = {}
        self.failed: tuple[OptimizerShard, BaseException] | None = None

    def add(self, shard: OptimizerShard, pieces: Sequence[list[torch.Tensor]], remote: Sequence[torch.Tensor]) -> None:
        self.updates[id(shard.bucket)] = DeferredUpdate(self, shard, pieces, remote)

    def start(self) -> None:
        """Hand the updates to their thread."""
        updates = list(self.updates.values())
        for k, one in enumerate(updates):
            following = updates[k + 1] if k + 1 < len(updates) else None
            one.start(following if following is not None and following.shard.home is one.shard.home else None)


class DeferredUpdate:
    """The update of one optimizer shard, on its way.

    Args:
        step: which it is a part of.
        pieces: per parameter group; their gradients are taken from them now.
        remote: those whose gradients are on the other side of the link.
    """

    def __init__(
        self,
        step: DeferredStep,
        shard: OptimizerShard,
        pieces: Sequence[list[torch.Tensor]],
        remote: Sequence[torch.Tensor],
    ) -> None:
        self.step, self.shard, self.pieces, self.remote = step, shard, pieces, remote
        self._grads = [(p, p.grad) for held in pieces for p in held if p.grad is not None]
        shard.take_grads()
        self._mark: torch.Event | None = None
        self._end: torch.Event | None = None
        self._future: Future[None] | None = None

    def start(self, following: DeferredUpdate | None) -> None:
        """Hand it to the thread. What the device was told so far comes before it.

        Args:
            following: the next one, to be read ahead.
        """
        device = self.shard.bucket.device
        if events.listeners:
            events.start(events.UPDATE, self._name, 0)
        if without_values():  # which are this thread's alone; in a plan, listeners are told what is beside what
            self._future = Future()
            events.phase("update", self._name)
            self._future.set_result(self._run(following))
            events.phase("step", type(self.step.optimizer).__name__)
            return
        if devices.runs_late(device):
            self._mark = devices.mark(device)
        self._future = _thread(self.shard.home).submit(self._run, following)

    def wait(self) -> None:
        """Until it has taken place. What the device does next comes after it.

        Raises:
            UpdateFailed: it, or one before it in its step, failed; whatever the step was to change is marked.
        """
        assert self._future is not None
        told = bool(events.listeners)
        if told:
            events.wait(events.UPDATE, self._name)
        self.drain()
        if told:
            events.waited(events.UPDATE, self._name)
        if self.step.failed is not None:
            for one in self.step.updates.values():
                one.drain()
            shard, error = self.step.failed
            raise shard.fail(error).error() from error
        if self._end is not None:
            devices.current_stream(self.shard.bucket.device).wait_event(self._end)

    @property
    def _name(self) -> str:
        return self.shard.bucket.label

    def drain(self) -> None:
        """Until it does not run any more, however it ended."""
        if self._future is not None:
            self._future.exception()

    @torch.no_grad()
    def _run(self, following: DeferredUpdate | None) -> None:
        shard = self.shard
        try:
            if self.step.failed is not None:
                return
            with self._beside():
                shard.begin()
                if following is not None and shard.home.buffers > 1:
                    following.shard.begin()
                for piece, grad in self._grads:
                    piece.grad = grad
                update(self.step.optimizer, shard, self.pieces, self.remote)
        except BaseException as error:
            self.step.failed = shard, error
            if following is not None:
                following.shard.cancel()
            raise
        finally:
            shard.cancel()
            for piece, _ in self._grads:
                piece.grad = None
            self._grads.clear()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On a device that runs late, a stream beside the one that the model computes on."""
        if self._mark is None:
            yield
            return
        stream = self.shard.home.step_link.stream
        with stream:
            stream.wait_event(self._mark)
            yield
            self._end = stream.record_event()


def let_finish(shards: Sequence[OptimizerShard]) -> None:
    """Before these are updated at once: what is under way at their homes, of another model as a rule, has the buffers
    that they need."""
    for home in {id(shard.home): shard.home for shard in shards}.values():
        thread = _threads.get(home)
        if thread is not None:
            thread.submit(int).result()


def can_defer(bucket: Bucket) -> bool:
    """May this bucket's update take place later than ``step()``, and is there something to hide?"""
    home = bucket.home
    if home is None or not bucket.overlap:
        return False
    return (bucket.placement.released or not bucket.placement.split_state) and (home.separate or home.disk is not None)


def snapshot(optimizer: Optimizer) -> Optimizer:
    """The optimizer with the settings that it has now, and the state that it will have."""
    out = object.__new__(type(optimizer))
    out.__dict__.update(optimizer.__dict__)
    out.param_groups = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in settings_of(group).items()} | {"params": []}
        for group in optimizer.param_groups
    ]
    return out


def is_plain(optimizer: Optimizer) -> bool:
    """Is a step nothing but its effect on pieces and their state? So it is for torch's own, not scaled by a scaler.

    And for ours, under the names of another library. A class that only has other arguments steps as its base does.
    """
    own = step_class(optimizer).__module__.startswith(("torch.optim.", "shardwise."))
    return own and getattr(optimizer, "grad_scale", None) is None and getattr(optimizer, "found_inf", None) is None


def some_deferred(optimizer: Optimizer, buckets: Sequence[Bucket]) -> bool:
    """May some rank's update of these take place later? The same answer on all ranks, whatever they hold."""
    return any(can_defer(bucket) for bucket in buckets) and is_plain(optimizer)


def defer(
    optimizer: Optimizer, todo: Sequence[OptimizerShard], pieces: Pieces, remote: Set[int]
) -> DeferredStep | None:
    """Put off the updates that need not take place now, if any. The first one of each optimizer shard does."""
    found = [shard for shard in todo if shard.laid_out and can_defer(shard.bucket)] if is_plain(optimizer) else []
    if not found:
        return None
    step = DeferredStep(optimizer)
    for shard in found:
        step.add(shard, *pieces_of(shard, pieces, remote))
    return step
