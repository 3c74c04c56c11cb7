"""The gradients of a message of small buckets, when all are there at once and none was before: as a rule.

They are taken, packed, reduced and put in their places in a few calls for all of them, straight from where autograd
left them in ``p.grad``. Whatever else may happen to a gradient is a matter of its bucket, see
:mod:`shardwise.engine.gradients`, which goes on from there at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not

import torch

from shardwise.comm.joined import JoinedReduction
from shardwise.comm.stats import Op
from shardwise.engine.bucket import Bucket
from shardwise.engine.packing import Packing

_IS_SPARSE, _REDUCED = attrgetter("is_sparse"), attrgetter("reduced")


class Batch:
    """One such message.

    Args:
        buckets: of one kind, more than one.
        packing: how they lie in the message.
        op: names it.

    Attributes:
        ids: of its parameters.
        split: their gradients are.
    """

    def __init__(self, buckets: Sequence[Bucket], packing: Packing, op: Op) -> None:
        first = buckets[0]
        self._mesh, self._ledger, self._share, self._op, self._packing = (
            first.mesh,
            first.ledger,
            first.share,
            op,
            packing,
        )
        self._params = [p for b in buckets for p in b.params]
        self._grads = [b.grads for b in buckets]
        self.ids = [id(p) for p in self._params]
        self.split = any(grads.split for grads in self._grads)
        self._found: list[torch.Tensor] = []
        self._reduced: list[torch.Tensor | None] = []  # of each bucket, and the held part, as the message has it
        self._held: list[torch.Tensor] = []
        self._together: JoinedReduction | None = None

    def look(self) -> bool:
        """Is there a gradient of each parameter?"""
        found = [p.grad for p in self._params]
        if not all(map(is_not, found, repeat(None))) or any(map(_IS_SPARSE, found)) or not self._packing.idle:
            return False
        self._found = found  # type: ignore[assignment]
        return True

    def start(self) -> None:
        """Take them, and send them."""
        found, self._found = self._found, []
        for p in self._params:
            p.grad = None
        self._ledger.adopt_all(found, "gather_buffers")
        packed = self._packing.pack(found, self._share)
        together = self._together = JoinedReduction(self._mesh, packed, self._op, self._ledger, self._packing.free)
        self._ledger.disown_all(found, "gather_buffers")
        del found
        for grads in self._grads:
            grads.reduction = together
        together.start(self._places())

    def _places(self) -> list[torch.Tensor]:
        """``(copies, n)`` of each bucket: where the sums go."""
        if not self._reduced or not all(map(is_, map(_REDUCED, self._grads), self._reduced)):
            copies = len(self._mesh.held)
            self._held = [grads.held().view(copies, -1) for grads in self._grads]
            self._reduced = list(map(_REDUCED, self._grads))
        return self._held

    def advance(self) -> None:
        """Start the second stage, if the first has ended."""
        if self._together is not None:
            self._together.advance()

    def finish(self) -> None:
        """Wait, and have them reduced."""
        together, self._together = self._together, None
        if together is None:
            return
        together.wait()
        for grads in self._grads:
            if grads.reduction is together:
                grads.have_come()
        if self.split:  # they may be freed before the next backward
            self._reduced, self._held = [], []
