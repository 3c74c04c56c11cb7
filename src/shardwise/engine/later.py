"""Updates that ``optimizer.step()`` asks for and the next forward waits for, unit by unit.

With clipping, no unit can be updated before all gradients are there. What can be hidden then is the update itself,
behind the next forward: ``step()`` hands updates to a thread (torch's kernels and the disk's threads run without the
interpreter's lock) and returns; the forward waits for a unit's update when it reaches the unit, and a gather of the
next unit begins after the unit before it has been told to compute. The arithmetic is the same, in the same order per
unit, with the settings (learning rate, ...) that the optimizer had at ``step()``.

Whatever else looks at values, state or gradients first waits too (:meth:`shardwise.engine.unit.Unit.catch_up`). Units
whose values are whole on each rank while the optimizer state is split are updated at once: their gather has to begin in
``step()``, because what comes next may run on one rank only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch.optim import Optimizer

from shardwise.engine.bucket import Bucket
from shardwise.engine.offload import Part, Pieces, pieces_of, settings_of, update


class Update:
    """The update of one part, on its way.

    Args:
        optimizer: a snapshot, see :func:`snapshot`.
        pieces: per parameter group; their gradients are taken from them now.
        crossing: those whose gradients are on the other side of the link.
    """

    def __init__(
        self, optimizer: Optimizer, part: Part, pieces: Sequence[list[torch.Tensor]], crossing: Sequence[torch.Tensor]
    ) -> None:
        self.optimizer, self.part, self.pieces, self.crossing = optimizer, part, pieces, crossing
        self._grads = [(p, p.grad) for held in pieces for p in held if p.grad is not None]
        part.take_grads()
        self._mark: torch.cuda.Event | None = None
        self._end: torch.cuda.Event | None = None
        self._future: Future[None] | None = None

    def start(self, following: Update | None) -> None:
        """Hand it to the thread. What the device was told so far comes before it.

        Args:
            following: the next one, to be read ahead.
        """
        home, device = self.part.home, self.part.bucket.device
        if device.type == "cuda":
            self._mark = torch.cuda.current_stream(device).record_event()
        self._future = home.thread.submit(self._run, following)

    def wait(self) -> None:
        """Until it has taken place. What the device does next comes after it.

        Raises:
            ShardwiseError: it failed.
        """
        assert self._future is not None
        self._future.result()
        if self._end is not None:
            torch.cuda.current_stream(self.part.bucket.device).wait_event(self._end)

    @torch.no_grad()
    def _run(self, following: Update | None) -> None:
        home = self.part.home
        if home.failed is not None:  # an earlier one: what follows would only hide why
            raise home.failed
        try:
            with self._beside():
                self.part.begin()
                if following is not None and home.buffers > 1:
                    following.part.begin()
                for piece, grad in self._grads:
                    piece.grad = grad
                update(self.optimizer, self.part, self.pieces, self.crossing)
        except Exception as error:
            home.failed = error
            if following is not None:
                following.part.cancel()
            raise
        finally:
            self.part.cancel()
            for piece, _ in self._grads:
                piece.grad = None
            self._grads.clear()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On CUDA, a stream beside the one that the model computes on."""
        if self._mark is None:
            yield
            return
        stream = self.part.home.step_link.stream
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            stream.wait_event(self._mark)
            yield
            self._end = stream.record_event()


def can_wait(bucket: Bucket) -> bool:
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
    """Is a step nothing but its effect on pieces and their state? So it is for torch's own, not scaled by a scaler."""
    own = type(optimizer).__module__.startswith("torch.optim.")
    return own and getattr(optimizer, "grad_scale", None) is None and getattr(optimizer, "found_inf", None) is None


def some_wait(optimizer: Optimizer, buckets: Sequence[Bucket]) -> bool:
    """May some rank's update of these take place later? The same answer on all ranks, whatever they hold."""
    return is_plain(optimizer) and any(can_wait(bucket) for bucket in buckets)


def plan(optimizer: Optimizer, todo: Sequence[Part], pieces: Pieces, crossing: Set[int]) -> dict[int, Update]:
    """The updates that need not take place now, by ``id`` of the bucket. The first one of each part does."""
    parts = [part for part in todo if part.known and can_wait(part.bucket)] if is_plain(optimizer) else []
    frozen = snapshot(optimizer) if parts else optimizer
    return {id(part.bucket): Update(frozen, part, *pieces_of(part, pieces, crossing)) for part in parts}


def start(updates: Sequence[Update]) -> None:
    """Hand updates to their thread, in this order."""
    for one in updates:
        one.part.home.failed = None
    for k, one in enumerate(updates):
        following = updates[k + 1] if k + 1 < len(updates) else None
        one.start(following if following is not None and following.part.home is one.part.home else None)
