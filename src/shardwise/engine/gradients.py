"""A bucket's gradients: how they arrive, are reduced, and what ``p.grad`` and the optimizer see of them.

They are copied into a flat buffer in the order autograd makes them, which is reduced as a whole. Where the gradient is
kept whole that buffer is the gradient itself, and the reduce works in place; where it is split, or has its home on the
host, the buffer lives until the reduce has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from shardwise.comm.mesh import Reduction
from shardwise.errors import GradientError
from shardwise.tiers.aligned import padded
from shardwise.tiers.home import Loan
from shardwise.tiers.link import Copy

if TYPE_CHECKING:
    from shardwise.engine.bucket import Bucket


class Gradients:
    """The gradients of one bucket's parameters.

    Args:
        bucket: whose; its layout and place are settled.
        split: each rank keeps those of its held shards only.
        on_host: reduced gradients are kept in host memory, and cross to it in the compute dtype.
        handle: the class of what ``p.grad`` shows where that is not a plain tensor; made of these and an index.

    Attributes:
        reduced: the reduced gradients, flat: of the held shards where they are split, else of all. Made when needed.
        raw: what arrived in a backward, flat, not yet reduced.
        valid: per parameter: is there a reduced gradient of an earlier backward that was not zeroed?
        arrived: is there one in ``raw``?
        seen: did one arrive in this backward, reduced or not?
        shown: was there one before this backward?
        spent: was it used up by an update in the backward, and not zeroed since?
    """

    def __init__(self, bucket: Bucket, *, split: bool, on_host: bool, handle: type[Any]) -> None:
        self.bucket, self.split, self.on_host, self._handle = bucket, split, on_host, handle
        # Does ``p.grad`` show a handle? Also where an update may still need what it shows.
        self.sharded = bucket.split_optimizer or on_host or bucket.home is not None
        n = len(bucket.params)
        self.valid, self.arrived, self.seen = [False] * n, [False] * n, [False] * n
        self.shown, self.spent = [False] * n, [False] * n
        self.reduced: torch.Tensor | None = None
        self.raw: torch.Tensor | None = None
        self.reduction: Reduction | None = None
        self._reducing: torch.Tensor | None = None  # the ``raw`` that is being reduced
        self._merge: torch.Tensor | None = None  # what it is reduced to, if that is not its last place
        self._crossing: tuple[Copy, torch.Tensor, Loan | None] | None = None  # from there to the host
        self._handles: list[torch.Tensor] | None = None
        self._pieces: list[list[torch.Tensor]] = []

    # --- where they are -------------------------------------------------------------------------
    def open(self) -> torch.Tensor:
        """The reduced gradients; zeros if there are none yet."""
        self.bucket.catch_up()
        self._land()
        if self.reduced is None:
            b = self.bucket
            n = b.held.stop - b.held.start if self.split else b.layout.numel
            if self.on_host:
                self.reduced = b.empty(n, b.master_dtype, on_host=True).zero_()
                b.ledger.adopt(self.reduced, "gradients")
            else:
                self.reduced = b.ledger.empty(n, b.master_dtype, b.device, "gradients").zero_()
            origin = b.held.start if self.split else 0
            self._pieces = [[b.view(p, self.reduced, origin) for p in ps] for ps in b.pieces]
        return self.reduced

    def held(self) -> torch.Tensor:
        """The reduced gradients of the held shards, flat."""
        return self._held(self.open())

    def _held(self, grad: torch.Tensor) -> torch.Tensor:
        return grad if self.split else grad[self.bucket.held]

    def pieces(self, index: int) -> list[torch.Tensor]:
        """Views of the reduced gradient of parameter ``index``, one per held piece."""
        self.open()
        return self._pieces[index]

    def whole(self, index: int) -> torch.Tensor:
        """The reduced gradient of parameter ``index``, where this rank holds all of it."""
        slot = self.bucket.layout.slots[index]
        return self.open()[slot.offset : slot.stop].view(slot.shape)

    def full(self) -> torch.Tensor:
        """All reduced gradients in a new flat tensor (collective where they are split)."""
        b = self.bucket
        out = torch.zeros(b.layout.numel, dtype=b.master_dtype, device=b.device)
        if self.reduced is not None:
            out[b.held].copy_(self.held())
        if b.split_optimizer:
            with b.told("gradients"):
                b.mesh.gather(out, b.op("state")).wait()
        return out

    # --- one backward ---------------------------------------------------------------------------
    def read_flags(self) -> None:
        """Before a backward: forget what the user has zeroed (``p.grad is None``), hide the rest from autograd."""
        for i, p in enumerate(self.bucket.params):
            self.shown[i] = p.grad is not None
            if p.grad is None or self.spent[i]:
                if p.grad is not None:
                    self._refuse_spent(i)
                self.spent[i] = False
                self.valid[i] = self.arrived[i] = self.seen[i] = False
            else:
                if not self.is_shown(i, p.grad):
                    self.adopt(i, p.grad)
                p.grad = None
        if self.raw is not None and not any(self.arrived):
            self._close(self.raw)
            self.raw = None

    def _open_raw(self) -> torch.Tensor:
        """The flat buffer gradients arrive in: the whole gradient itself where that is kept and empty."""
        b = self.bucket
        in_place = not self.split and b.reduce_dtype == b.master_dtype
        if in_place and self.reduction is None and not any(self.valid):
            return self.open()
        return b.ledger.empty(b.layout.numel, b.reduce_dtype, b.device, "gather_buffers")

    def _close(self, raw: torch.Tensor) -> None:
        if raw is not self.reduced:
            self.bucket.ledger.drop(raw, "gather_buffers")

    def arrive(self, index: int, grad: torch.Tensor) -> None:
        """Copy one gradient into its place as autograd hands it over."""
        if self.raw is None:
            self.raw = self._open_raw()
        slot, share = self.bucket.layout.slots[index], self.bucket.share
        place = self.raw[slot.offset : slot.stop].view(slot.shape)
        # The mean is taken here, in the pass that copies anyway, so that a reduce is a plain sum.
        if self.arrived[index]:
            place.add_(grad, alpha=share)
            return
        self.arrived[index] = self.seen[index] = True
        if grad.dtype == place.dtype:
            torch.mul(grad, share, out=place)
        else:
            place.copy_(grad).mul_(share)

    def launch_reduce(self) -> None:
        """Start reducing what arrived; parameters without a gradient on this rank count as zeros."""
        self.finish_reduce()
        b = self.bucket
        raw = self.raw if self.raw is not None else self._open_raw()
        self.raw, self._reducing = None, raw
        for i, slot in enumerate(b.layout.slots):
            if not self.arrived[i]:
                raw[slot.offset : slot.stop].zero_()
        if raw is self.reduced:
            out = raw[b.held]
        elif any(self.valid) or self.on_host:
            n = b.held.stop - b.held.start
            out = self._merge = b.ledger.empty(n, b.master_dtype, b.device, "gather_buffers")
        else:
            out = self.held()
        self.reduction = b.mesh.reduce(raw, out, b.op("reduce"), b.ledger)
        self.arrived = [False] * len(b.params)

    def advance_reduce(self) -> None:
        if self.reduction is not None:
            self.reduction.advance()

    def finish_reduce(self) -> None:
        """Wait for the reduce and add its result to what was already there."""
        merge = self._end_reduce()
        if merge is not None:
            if self.on_host:
                self._leave(merge)
            else:
                self._add(merge)
            self._drop_merge()
            self.valid = [True] * len(self.bucket.params)

    def _end_reduce(self) -> torch.Tensor | None:
        """Returns what has yet to be taken to its place."""
        if self.reduction is None:
            return None
        self.reduction.wait()
        self.reduction = None
        assert self._reducing is not None
        self._close(self._reducing)
        self._reducing = None
        if self._merge is None:
            self.valid = [True] * len(self.bucket.params)
        return self._merge

    def _drop_merge(self) -> None:
        if self._merge is not None:
            self.bucket.ledger.drop(self._merge, "gather_buffers")
            self._merge = None

    def _add(self, more: torch.Tensor) -> None:
        """Add to the reduced gradients of the held shards, or replace what is not valid."""
        held, b = self.held(), self.bucket
        for piece in (p for pieces in b.pieces for p in pieces):
            at = piece.offset - b.held.start
            into, add = held[at : at + piece.numel], more[at : at + piece.numel]
            into.add_(add) if self.valid[piece.slot] else into.copy_(add)

    # --- home on the host -----------------------------------------------------------------------
    def _leave(self, reduced: torch.Tensor) -> None:
        """Start to copy to the host, in the compute dtype; :meth:`open` waits for it."""
        home, b = self.bucket.home, self.bucket
        assert home is not None
        straight = not any(self.valid) and b.dtype == b.master_dtype
        if straight:
            loan, low = None, self.held()
        else:
            self._land()
            while len(home.landing) > 1:  # a buffer is free when the one before the last has landed
                home.landing.popleft()()
            loan = home.lend(padded(reduced.numel() * b.dtype.itemsize), "gradients", 2)
            low = loan.buffer[: reduced.numel() * b.dtype.itemsize].view(b.dtype)
            home.landing.append(self._land)
        self._crossing = home.link.to_host(reduced, low), low, loan
        self._adding = list(self.valid)

    def _land(self) -> None:
        """What was on its way to the host has arrived."""
        if self._crossing is None:
            return
        (copy, low, loan), self._crossing = self._crossing, None
        copy.wait()
        if loan is not None:
            valid, self.valid = self.valid, self._adding
            self._add(low)
            self.valid = valid
            loan.release()

    # --- other ends of a backward -------------------------------------------------------------------
    def keep(self) -> None:
        """Take what arrived as it is, without the other ranks. For whole gradients."""
        raw, grad = self.raw, self.open()
        if raw is None:
            return
        for i, slot in enumerate(self.bucket.layout.slots):
            mine = slice(slot.offset, slot.stop)
            if raw is grad:
                if not self.arrived[i]:
                    grad[mine].zero_()
            elif self.arrived[i]:
                grad[mine].add_(raw[mine]) if self.valid[i] else grad[mine].copy_(raw[mine])
            elif not self.valid[i]:
                grad[mine].zero_()
        self._close(raw)
        self.raw = None
        n = len(self.bucket.params)
        self.valid, self.arrived, self.seen = [True] * n, [False] * n, [False] * n

    def abandon(self) -> None:
        """Drop gradients that arrived in a backward that failed. Reduced ones of earlier backwards stay."""
        valid = self.valid
        self._end_reduce()
        self._drop_merge()
        self.valid = valid
        if self.raw is not None:
            self._close(self.raw)
            self.raw = None
        n = len(self.bucket.params)
        self.arrived, self.seen = [False] * n, [False] * n

    def spend(self) -> None:
        """An update has used the gradients up: free them, and let ``p.grad`` say so."""
        self.bucket.ledger.drop(self.open(), "gradients")
        self.reduced = self._handles = None
        self._pieces = []
        n = len(self.bucket.params)
        self.valid, self.spent = [False] * n, [True] * n

    # --- what others see ------------------------------------------------------------------------
    def show(self, index: int, param: nn.Parameter) -> None:
        """Put the gradient's public face into ``p.grad``."""
        if self.spent[index]:
            param.grad = self._handle(self, index)
            return
        if self._handles is None:
            if self.sharded:
                self._handles = [self._handle(self, i) for i in range(len(self.bucket.params))]
            else:
                grad = self.open()
                self._handles = [grad[s.offset : s.stop].view(s.shape) for s in self.bucket.layout.slots]
        param.grad = self._handles[index]

    def is_shown(self, index: int, grad: torch.Tensor) -> bool:
        """Is this what :meth:`show` put there?"""
        return self._handles is not None and grad is self._handles[index]

    def adopt(self, index: int, grad: torch.Tensor) -> None:
        """Take over a gradient that the user put into ``p.grad``."""
        self.valid[index] = True
        for (lo, hi), piece in zip(self.bucket.ranges(index), self.pieces(index), strict=True):
            piece.copy_(grad.detach().reshape(-1)[lo:hi].view(piece.shape))

    def for_step(self, index: int) -> list[torch.Tensor] | None:
        """What the optimizer sees for each held piece of a parameter; ``None`` if it has no gradient."""
        grad = self.bucket.params[index].grad
        if grad is None or (self.spent[index] and isinstance(grad, self._handle)):
            return None
        self.require_reduced(index)
        if not self.is_shown(index, grad):
            self.adopt(index, grad)
        return self.pieces(index)

    def zero(self, index: int) -> None:
        """Zero in place, as ``p.grad.zero_()`` asks."""
        if self.spent[index]:
            self.bucket.params[index].grad = None
            return
        for piece in self.pieces(index):
            piece.zero_()
        if self.raw is not None and self.arrived[index]:
            slot = self.bucket.layout.slots[index]
            self.raw[slot.offset : slot.stop].zero_()

    def require_reduced(self, index: int) -> None:
        """Raise if gradients wait for a reduce (inside ``no_sync``): a step now would let ranks diverge.

        Or if there are none any more, because an update in the backward has used them up.
        """
        if self.spent[index]:
            self._refuse_spent(index)
        if self.arrived[index]:
            raise GradientError(
                "the gradient has not been reduced over the ranks yet: its last backward ran under no_sync()",
                where=f"parameter '{self.bucket.names[index]}'",
                fix="run the last micro-batch's backward outside no_sync() before clipping or stepping",
            )

    def _refuse_spent(self, index: int) -> NoReturn:
        raise GradientError(
            "the gradient is gone: its update took place during the backward (optimizer_in_backward)",
            where=f"parameter '{self.bucket.names[index]}'",
            fix="clear gradients after each step; leave optimizer_in_backward out to clip, scale or read gradients, "
            "or to let them add up",
        )
