"""A bucket's gradients: how they arrive, are reduced, and what ``p.grad`` and the optimizer see of them.

They are copied into a flat buffer, which is reduced as a whole. Where the gradient is kept whole that buffer is the
gradient itself, they are copied as autograd makes them, and the reduce works in place. Where it is split, or has its
home on the host, the buffer lives from just before the reduce to its end: until then they stay as autograd made them,
one by one, beside activations that go. What is small stays so under every strategy, until it is packed into a message.

What the script zeroes (``p.grad = None``) is freed before the next forward, as without us, where gradients are split:
each rank then has none beside the activations of a forward, which are most when gradients are fewest.

Each parameter's gradient is in one state: see :mod:`shardwise.engine.grad_states`. What arrived *in this backward*,
reduced or not, is the backward's to know, not the gradient's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import attrgetter, is_

import torch
from torch import nn

from shardwise.comm.joined import JoinedReduction
from shardwise.comm.reduction import Reduction
from shardwise.engine.flat import FlatParameters
from shardwise.engine.grad_states import GradState, GradStates
from shardwise.engine.scalings import Scaling, Scalings, Unasked
from shardwise.errors import GradientError, UnitError
from shardwise.tiers.aligned import padded
from shardwise.tiers.home import BufferLease
from shardwise.tiers.link import Copy

_IS_SPARSE = attrgetter("is_sparse")

Handle = Callable[["Gradients", int], torch.Tensor]
"""Makes what ``p.grad`` shows of a gradient that this rank does not hold whole."""


class Gradients:
    """The gradients of one bucket's parameters.

    Args:
        bucket: whose; its layout and placement are settled.
        handle: makes what ``p.grad`` shows where the placement says so.

    Attributes:
        states: of each parameter's gradient.
        scalings: what they were multiplied by since they were reduced.
        reduced: the reduced gradients, in the master dtype: ``(copies * n,)`` where they are split, else
            ``(parts * n,)``. Made when needed.
        raw: ``(parts * n,)`` what arrived in a backward and is not yet reduced, in the dtype of the wire.
        arrived: per parameter (by index), what arrived in this backward and is not in ``raw`` yet.
        packed: they travel with others, and are packed from where autograd made them: one copy of many at a time.
    """

    def __init__(self, bucket: FlatParameters, handle: Handle) -> None:
        self.bucket, self._handle = bucket, handle
        plan = bucket.placement
        self.split, self.on_host, self.shows_handles = plan.grads_split, plan.grads_on_host, plan.shows_handles
        # Alone, nothing is to be reduced: gradients add up in their last place, whatever is there already.
        self._alone = bucket.mesh.parts == 1 and not self.split and bucket.reduce_dtype == bucket.master_dtype
        self.packed = False
        self.states = GradStates(len(bucket.params), bucket.label)
        self.scalings = Scalings(len(bucket.params)) if plan.grads_cross else Unasked()
        self.reduced: torch.Tensor | None = None
        self.raw: torch.Tensor | None = None
        self.arrived: dict[int, torch.Tensor] = {}
        self.given: object = None  # what :meth:`all_for_step` returned when pieces got it to keep
        self.reduction: Reduction | JoinedReduction | None = None
        self._reducing: torch.Tensor | None = None  # the ``raw`` that is being reduced
        self._merge: torch.Tensor | None = None  # what it is reduced to, if that is not its last place
        self._crossing: tuple[Copy, torch.Tensor, BufferLease | None] | None = None  # from there to the host
        self._sent: Copy | None = None  # to the device, from their home on the host
        self._adding: list[bool] = []  # per parameter: what crosses is added to what is there
        self._shown: list[torch.Tensor] | None = None  # what ``p.grad`` shows
        self._unreduced: list[torch.Tensor] | None = None  # what it shows of gradients that wait for their reduce
        self._pieces: list[list[torch.Tensor]] = []
        self._places: list[torch.Tensor] = []  # views of ``raw``, one per parameter
        self._whole: list[torch.Tensor] = []  # the same of ``reduced``, where that is whole
        self._waited: list[bool] = []  # per parameter: did something wait when this backward began, and does it still?

    # --- where they are -------------------------------------------------------------------------
    @property
    def there(self) -> bool:
        """Are there any reduced ones?"""
        return self.reduced is not None

    def open(self, *, zeros: bool = True) -> torch.Tensor:
        """The reduced gradients; zeros if there are none yet.

        Args:
            zeros: ``False``: all of them are written to next, so new memory stays as it is: to touch it once more costs
                a few per cent of a step.
        """
        self.bucket.finish_update()
        if self._crossing is not None:
            self._land()
        if self._sent is not None:  # whoever looks may write: zero_grad(set_to_none=False) does
            self._sent.wait()
            self._sent = None
        if self.reduced is None:
            b = self.bucket
            n = b.held.stop - b.held.start if self.split else b.layout.numel
            if self.on_host:
                self.reduced = b.empty(n, b.master_dtype, on_host=True).zero_()
                b.ledger.adopt(self.reduced, "gradients")
            else:
                self.reduced = b.ledger.empty(n, b.master_dtype, b.device, "gradients")
                if zeros:
                    self.reduced.zero_()
            origin = b.held.start if self.split else 0
            if not self.shows_handles:
                self._shown = None  # handles of what was spent
            self._whole = self._cut(self.reduced) if n == b.layout.numel else []
            self._pieces = [[b.view(p, self.reduced, origin) for p in ps] for ps in b.pieces]
        return self.reduced

    def sent(self, copy: Copy) -> None:
        """They are on their way to the device, for an update there; :meth:`open` waits until they have left."""
        self._sent = copy

    def scaled(self) -> tuple[Scaling, ...]:
        """What all gradients that there are were multiplied by since they were reduced."""
        return self.scalings.common(i for i, state in enumerate(self.states.states) if state is GradState.REDUCED)

    def _cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a ``(parts * n,)`` buffer, one per parameter."""
        return [flat[s.offset : s.stop].view(s.shape) for s in self.bucket.layout.slots]

    def held(self) -> torch.Tensor:
        """``(copies * n,)`` the reduced gradients of the held shards."""
        grad = self.open()
        return grad if self.split else grad[self.bucket.held]

    def pieces(self, index: int) -> list[torch.Tensor]:
        """Views of the reduced gradient of parameter ``index``, one per held piece."""
        self.open()
        return self._pieces[index]

    def whole(self, index: int) -> torch.Tensor:
        """The reduced gradient of parameter ``index`` in its shape, where this rank holds all of it."""
        self.open()
        return self._whole[index]

    def unreduced(self, index: int) -> torch.Tensor:
        """A copy of what waits of the gradient of parameter ``index``, not divided by the number of ranks.

        As ``no_sync()`` keeps them. What is reduced already is in it; for that, this rank has to hold it whole.
        """
        slot = self.bucket.layout.slots[index]
        assert self.raw is not None
        mine = self.raw[slot.offset : slot.stop].view(slot.shape)
        found = mine.to(self.bucket.master_dtype, copy=True).div_(self.bucket.share)
        return found.add_(self.whole(index)) if self.states.is_reduced(index) else found

    # --- one backward ---------------------------------------------------------------------------
    def read_flags(self) -> list[bool]:
        """Before a backward: forget what the script has zeroed (``p.grad is None``), take over what it put there.

        Returns:
            Per parameter: was there a gradient before this backward?
        """
        params = self.bucket.params
        with torch._C.DisableTorchFunctionSubclass():  # of parameters that are released
            grads = [p.grad for p in params]
        shown = [grad is not None for grad in grads]
        if not any(shown):
            self.forget_zeroed()
            return shown
        for i, there in enumerate(shown):
            if there:
                self._require_present(i)
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                self.states.to(i, GradState.NONE)
            elif not self.is_shown(i, grad):
                self.adopt(i, grad)
                self.show(i, p)
        if self.raw is not None and not self.states.any_waits:
            self._close(self.raw)
            self.raw, self._places = None, []
        self._waited = [self.states.waits(i) for i in range(len(shown))] if self.states.any_waits else []
        return shown

    def forget_zeroed(self) -> None:
        """Before a backward: the script has zeroed all of them."""
        self.states.zeroed()
        self._waited = []
        if self.raw is not None:
            self._close(self.raw)
            self.raw, self._places = None, []
        if self.split and self.reduced is not None:
            self.free_zeroed()

    def free_zeroed(self) -> None:
        """Free reduced gradients that are split, if the script has zeroed all of them and keeps no handle of one.

        No update may be under way. Pinned memory of the host stays: making it takes longer than a step may.
        """
        if self.reduced is None or not self.split or self.on_host or self.reduction is not None:
            return
        with torch._C.DisableTorchFunctionSubclass():  # of parameters that are released
            if any(p.grad is not None for p in self.bucket.params):
                return
        if self.states.any_waits or any(_is_kept(handles) for handles in (self._shown, self._unreduced)):
            return
        self.bucket.ledger.drop(self.reduced, "gradients")
        self.reduced = self.given = None
        self._pieces, self._whole = [], []

    @property
    def _at_once(self) -> bool:
        """Is what arrives copied straight into the reduced gradient?"""
        return (
            not self.split
            and self.bucket.reduce_dtype == self.bucket.master_dtype
            and self.reduction is None
            and (self._alone or not self.states.any_reduced)
        )

    def _open_raw(self) -> torch.Tensor:
        """The flat buffer gradients arrive in: the whole gradient itself where that is kept and empty."""
        b = self.bucket
        if self._at_once:
            raw = self.open()
            self._places = self._whole
        else:
            raw = b.ledger.empty(b.layout.numel, b.reduce_dtype, b.device, "gather_buffers")
            self._places = self._cut(raw)
        return raw

    def _close(self, raw: torch.Tensor) -> None:
        if raw is not self.reduced:
            self.bucket.ledger.drop(raw, "gather_buffers")

    def collect_own(self, had: set[int], *, detach: bool) -> Iterable[int]:
        """Take gradients that autograd has left in ``p.grad``.

        Args:
            had: parameters (by ``id``) that showed one before the backward: not of these.
            detach: they have a graph of their own.

        Returns:
            The parameters (by ``id``) that there was one of.
        """
        params = self.bucket.params
        with torch._C.DisableTorchFunctionSubclass():  # of parameters that are released
            found = [p.grad for p in params]
            if all(map(is_, found, repeat(None))):
                return ()
            if had:
                found = [None if id(p) in had else grad for p, grad in zip(params, found, strict=True)]
            for p, grad in zip(params, found, strict=True):
                if grad is not None:
                    p.grad = None
        if not had and not detach and self.raw is None and not self.arrived and self.states.all_are(GradState.NONE):
            grads = [grad for grad in found if grad is not None]
            if len(grads) == len(params) and not any(map(_IS_SPARSE, grads)):
                self.states.all_arrived()
                self.arrived = dict(enumerate(grads))
                self.bucket.ledger.adopt_all(grads, "gather_buffers")
                return map(id, params)
        for i, grad in enumerate(found):
            if grad is not None:
                self.take_one(i, grad, detach=detach)
        return [id(p) for p, grad in zip(params, found, strict=True) if grad is not None]

    def take_one(self, index: int, grad: torch.Tensor, *, detach: bool) -> None:
        """:meth:`arrive`, of what autograd has put into ``p.grad``.

        Raises:
            UnitError: it is sparse.
        """
        if grad.is_sparse:
            raise UnitError(
                f"parameter '{self.bucket.names[index]}' has a sparse gradient, which has no flat layout",
                where=f"unit {self.bucket.label}",
                fix="build the embedding with sparse=False",
            )
        if not detach:
            self.arrive(index, grad)
            return
        with torch.no_grad():
            self.arrive(index, grad.detach())

    def arrive(self, index: int, grad: torch.Tensor) -> None:
        """Take one gradient as autograd hands it over."""
        if self.raw is None:
            if index not in self.arrived and (self.packed or not self._at_once):
                self.states.arrive(index)
                self.arrived[index] = grad
                self.bucket.ledger.adopt(grad, "gather_buffers")
                return
            self.collect()
            self.raw = self.raw if self.raw is not None else self._open_raw()
        place, states = self._places[index], self.states.states
        if states[index] is GradState.NONE and grad.dtype is place.dtype:  # as a rule
            states[index] = GradState.LOCAL
            torch.mul(grad, self.bucket.share, out=place)
            return
        more = self._in_place(index)
        self._put(index, grad, add=not self.states.arrive(index) or more)

    def _put(self, index: int, grad: torch.Tensor, *, add: bool) -> None:
        """Copy a gradient to its place in ``raw``, or add it there.

        The mean is taken here, in the pass that copies anyway, so that a reduce is a plain sum.
        """
        place, share = self._places[index], self.bucket.share
        if add:
            place.add_(grad, alpha=share)
        elif grad.dtype == place.dtype:
            torch.mul(grad, share, out=place)
        else:
            place.copy_(grad).mul_(share)

    def collect(self) -> None:
        """Copy what has arrived one by one into the flat buffer, and free it."""
        if not self.arrived:
            return
        with torch.no_grad():
            while self.arrived:
                if self.raw is None:
                    self.raw = self._open_raw()
                index, grad = self.arrived.popitem()
                self._put(index, grad, add=self._in_place(index))
                self.bucket.ledger.drop(grad, "gather_buffers")

    def _drop_arrived(self) -> None:
        if self.arrived:
            self.bucket.ledger.disown_all(list(self.arrived.values()), "gather_buffers")
            self.arrived.clear()

    def _in_place(self, index: int) -> bool:
        """Is what arrives added to what is reduced already?"""
        return self.raw is self.reduced and self.states.is_reduced(index)

    def are_summed(self) -> bool:
        """Nothing has to be sent for what arrived to be the sum over the ranks. If so, it is in its place now."""
        if not self._alone:
            return False
        self.scalings.forget()
        self._lay_out()
        self._waited = []
        self.states.reduced()
        return True

    def launch_reduce(self) -> None:
        """Start reducing what arrived, by itself; parameters without a gradient on this rank count as zeros."""
        if self.are_summed():
            return
        raw = self.take()
        out = self._destination(raw is self.reduced)
        self.reduction = self.bucket.mesh.reduce(raw, out, self.bucket.op("reduce"), self.bucket.ledger)

    @property
    def are_loose(self) -> bool:
        """Do the gradients of all parameters lie as autograd made them, to be packed from there?"""
        return self.raw is None and len(self.arrived) == len(self.bucket.params)

    def loose(self) -> list[torch.Tensor]:
        """The gradients of all parameters as autograd made them, not yet divided by the number of ranks."""
        arrived = self.arrived
        return [arrived[i] for i in range(len(arrived))]

    def take(self) -> torch.Tensor:
        """``(parts * n,)`` what is to be reduced. Then :meth:`reduce_with`."""
        self.finish_reduce()
        raw = self._reducing = self._lay_out()
        return raw

    def _lay_out(self) -> torch.Tensor:
        """What arrived, end to end, with zeros where nothing did."""
        self.collect()
        raw = self.raw if self.raw is not None else self._open_raw()
        self.raw = None
        places, self._places = self._places, []
        if not self.states.all_are(GradState.LOCAL):
            for i, place in enumerate(places):
                if not self.states.waits(i) and not (raw is self.reduced and self.states.is_reduced(i)):
                    place.zero_()
        return raw

    def _destination(self, in_place: bool) -> torch.Tensor:
        """``(copies * n,)`` where the sum goes, of what waited and is taken from here on."""
        b = self.bucket
        self.scalings.forget()
        self.states.taken()
        if in_place:
            return self.held()
        if self.states.any_reduced or self.on_host:
            self._merge = b.ledger.empty(b.held.stop - b.held.start, b.master_dtype, b.device, "gather_buffers")
            return self._merge
        return self.open(zeros=False) if self.split else self.held()

    @property
    def stays(self) -> bool:
        """Is what is reduced straight away in its place, and stays there? Whatever there was before is zeroed."""
        b = self.bucket
        return (
            self.packed
            and not self.on_host
            and not b.placement.grads_cross
            and b.placement.trainable
            and b.home is None
        )

    def reduce_with(self, reduction: JoinedReduction) -> torch.Tensor:
        """What arrived is a part of this reduce, which has copied what it is to send.

        Returns:
            ``(copies * n,)`` where the sum goes.
        """
        in_place = self._reducing is not None and self._reducing is self.reduced
        self._close_reducing()
        self._drop_arrived()
        self.finish_reduce()
        self.reduction = reduction
        return self._destination(in_place)

    def advance_reduce(self) -> None:
        """Start the second stage of the reduce, if it has one and the first has ended."""
        if self.reduction is not None:
            self.reduction.advance()
            self._close_reducing()

    def have_come(self) -> None:
        """A reduce of all of them has ended, which found none in their places."""
        if self.arrived or self.raw is not None:  # meanwhile
            self.finish_reduce()
        else:
            self.reduction = None
            self.states.all_came()

    def finish_reduce(self) -> None:
        """Wait for the reduce and add its result to what was already there."""
        if self.reduction is None:
            return
        merge = self._end_reduce()
        if merge is not None:
            adding = [self.states.is_reduced(i) for i in range(len(self.bucket.params))]
            if self.on_host:
                self._leave(merge, adding)
            else:
                self._add(merge, adding)
            self._drop_merge()
        self._waited = []
        # More may have arrived while the reduce was under way: it still waits.
        if not self.states.any_waits:
            self.states.reduced()
            return
        waiting = [self.states.waits(i) for i in range(len(self.bucket.params))]
        for i, waits in enumerate(waiting):
            self.states.to(i, GradState.REDUCED)
            if waits:
                self.states.to(i, GradState.ADDING)

    def _end_reduce(self) -> torch.Tensor | None:
        """Returns what has yet to be taken to its place."""
        if self.reduction is None:
            return None
        self.reduction.wait()
        self.reduction = None
        self._close_reducing()
        return self._merge

    def _close_reducing(self) -> None:
        """The first stage is over: what was sent is not needed any more."""
        if self._reducing is not None:
            self._close(self._reducing)
            self._reducing = None

    def _drop_merge(self) -> None:
        if self._merge is not None:
            self.bucket.ledger.drop(self._merge, "gather_buffers")
            self._merge = None

    def _add(self, more: torch.Tensor, adding: Sequence[bool]) -> None:
        """Add ``more`` ``(copies * n,)`` to the reduced gradients of the held shards, or take their place."""
        held, b = self.held(), self.bucket
        for piece in (p for pieces in b.pieces for p in pieces):
            at = piece.offset - b.held.start
            into, add = held[at : at + piece.numel], more[at : at + piece.numel]
            into.add_(add) if adding[piece.slot] else into.copy_(add)

    # --- home on the host -----------------------------------------------------------------------
    def _leave(self, reduced: torch.Tensor, adding: list[bool]) -> None:
        """Start to copy to the host, in the compute dtype; :meth:`open` waits for it."""
        home, b = self.bucket.home, self.bucket
        assert home is not None
        straight = not any(adding) and b.dtype == b.master_dtype
        if straight:
            lease, low = None, self.held()
        else:
            self._land()
            while len(home.landing) > 1:  # a buffer is free when the one before the last has landed
                home.landing.popleft()()
            lease = home.lease(padded(reduced.numel() * b.dtype.itemsize), "gradients", 2)
            low = lease.buffer[: reduced.numel() * b.dtype.itemsize].view(b.dtype)
            home.landing.append(self._land)
        self._crossing = home.link.to_host(reduced, low), low, lease
        self._adding = adding

    def _land(self) -> None:
        """What was on its way to the host has arrived."""
        if self._crossing is None:
            return
        (copy, low, lease), self._crossing = self._crossing, None
        copy.wait()
        if lease is not None:
            self._add(low, self._adding)
            lease.release()

    # --- other ends of a backward -------------------------------------------------------------------
    def keep(self) -> None:
        """Take what arrived as it is, without the other ranks. For whole gradients."""
        self.collect()
        raw, grad = self.raw, self.open()
        if raw is None:
            return
        self.scalings.forget()
        for i, slot in enumerate(self.bucket.layout.slots):
            mine = slice(slot.offset, slot.stop)
            if raw is grad:
                if not self.states.waits(i) and not self.states.is_reduced(i):
                    grad[mine].zero_()
            elif self.states.waits(i):
                grad[mine].add_(raw[mine]) if self.states.is_reduced(i) else grad[mine].copy_(raw[mine])
            elif not self.states.is_reduced(i):
                grad[mine].zero_()
        self._close(raw)
        self.raw, self._places = None, []
        self.states.reduced()

    def forget_own(self, had: set[int]) -> None:
        """Take those that autograd has left in ``p.grad`` in a backward that failed away.

        Args:
            had: parameters (by ``id``) that showed one before.
        """
        with torch._C.DisableTorchFunctionSubclass():
            for p in self.bucket.params:
                if p.grad is not None and id(p) not in had:
                    p.grad = None

    def forget(self) -> None:
        """Drop gradients that arrived in a backward that failed. Reduced ones of earlier backwards stay.

        Those that waited for their reduce are in one buffer with what arrived: they are lost, and say so when used.
        """
        self._drop_arrived()
        if self.raw is not None:
            self._close(self.raw)
            self.raw, self._places = None, []
        self.states.lose(self._waited)
        self._waited = []

    def drop_reduce(self) -> None:
        """Wait for the reduce that such a backward has started, and drop its result."""
        self._end_reduce()
        self._drop_merge()

    def spend(self) -> None:
        """An update has used the gradients up: free them, and let ``p.grad`` say so."""
        self.bucket.ledger.drop(self.open(), "gradients")
        self.reduced = self._shown = None
        self._pieces, self._whole = [], []
        self.given = None
        self.states.spend()

    # --- what others see ------------------------------------------------------------------------
    def show(self, index: int, param: nn.Parameter) -> None:
        """Put the gradient's public face into ``p.grad``."""
        self.collect()
        unreduced = self.states[index] is GradState.LOST or (self.states.waits(index) and not self._alone)
        if unreduced and not self.shows_handles:
            if self._unreduced is None:
                self._unreduced = [self._handle(self, i) for i in range(len(self.bucket.params))]
            param.grad = self._unreduced[index]
            return
        param.grad = self.shown_all[index]

    @property
    def shown_all(self) -> list[torch.Tensor]:
        """What ``p.grad`` shows of gradients that are reduced, or spent."""
        if self._shown is None:
            if self.shows_handles or GradState.SPENT in self.states.states:
                self._shown = [self._handle(self, i) for i in range(len(self.bucket.params))]
            else:
                self.open()
                self._shown = list(self._whole)
        return self._shown

    def show_all(self) -> None:
        """:meth:`show` of all parameters."""
        params = self.bucket.params
        if self._shown is None or not self.states.all_are(GradState.REDUCED):
            for i, p in enumerate(params):
                self.show(i, p)
            return
        for p, shown in zip(params, self._shown, strict=True):
            p.grad = shown

    def show_again(self, index: int, param: nn.Parameter) -> None:
        """After a backward that failed: :meth:`show`, if the script has neither cleared nor replaced it."""
        if param.grad is not None and self.is_shown(index, param.grad):
            self.show(index, param)

    def is_shown(self, index: int, grad: torch.Tensor) -> bool:
        """Is this what :meth:`show` put there?"""
        if self._shown is not None and grad is self._shown[index]:
            return True
        return self._unreduced is not None and grad is self._unreduced[index]

    @torch.no_grad()
    def adopt(self, index: int, grad: torch.Tensor) -> None:
        """Take over a gradient that the script put into ``p.grad``, instead of what was there."""
        if self.states[index] is GradState.LOCAL:
            slot = self.bucket.layout.slots[index]
            assert self.raw is not None
            self.raw[slot.offset : slot.stop].view(slot.shape).copy_(grad).mul_(self.bucket.share)
            return
        self.states.to(index, GradState.REDUCED)
        self.scalings.forget(index)
        for (lo, hi), piece in zip(self.bucket.ranges(index), self.pieces(index), strict=True):
            piece.copy_(grad.detach().reshape(-1)[lo:hi].view(piece.shape))

    @property
    def are_given(self) -> bool:
        """Have pieces got gradients to keep, those that are reduced now, and as this bucket makes them?"""
        return self.given is self._pieces and self.states.all_are(GradState.REDUCED)

    def all_for_step(self) -> Sequence[list[torch.Tensor] | None]:
        """:meth:`for_step` of all parameters; the same object as long as they are in the same memory."""
        params, shown = self.bucket.params, self._shown
        if shown is not None and self.states.all_are(GradState.REDUCED) and all(map(is_, grads_of(params), shown)):
            self.open()
            return self._pieces
        return [self.for_step(i) if p.requires_grad else None for i, p in enumerate(params)]

    def for_step(self, index: int) -> list[torch.Tensor] | None:
        """What the optimizer sees for each held piece of a parameter; ``None`` if it has no gradient."""
        (grad,) = grads_of(self.bucket.params[index : index + 1])
        if grad is None or (self.states[index] is GradState.SPENT and self.is_shown(index, grad)):
            return None
        self.require_reduced(index)
        if not self.is_shown(index, grad):
            self.adopt(index, grad)
        return self.pieces(index)

    def zero(self, index: int) -> None:
        """Zero in place, as ``p.grad.zero_()`` asks."""
        if self.states[index] in (GradState.SPENT, GradState.LOST):
            self.bucket.params[index].grad = None
            return
        self.scalings.forget(index)
        for piece in self.pieces(index):
            piece.zero_()
        if self.raw is not None and self.states.waits(index):
            slot = self.bucket.layout.slots[index]
            self.raw[slot.offset : slot.stop].zero_()

    def require_reduced(self, index: int) -> None:
        """Raise if gradients wait for a reduce (inside ``no_sync``): a step now would let ranks diverge.

        Or if there are none any more: an update in the backward has used them up, or a backward that failed has taken
        them along.
        """
        self._require_present(index)
        if self.states.waits(index):
            raise GradientError(
                "the gradient has not been reduced over the ranks yet: its last backward ran under no_sync()",
                where=f"parameter '{self.bucket.names[index]}'",
                fix="run the last micro-batch's backward outside no_sync() before clipping or stepping",
            )

    def _require_present(self, index: int) -> None:
        state = self.states[index]
        if state is not GradState.SPENT and state is not GradState.LOST:
            return
        (grad,) = grads_of(self.bucket.params[index : index + 1])
        if state is GradState.SPENT:
            why = "its update took place during the backward (optimizer_in_backward)"
            fix = (
                "clear gradients after each step; leave optimizer_in_backward out to clip, scale or read gradients, or "
                "to let them add up"
            )
        elif grad is None or self.is_shown(index, grad):
            why = "it was gathered under no_sync(), and a backward that was to add to it failed"
            fix = "clear gradients (optimizer.zero_grad()) and run all micro-batches of this step again"
        else:
            return
        raise GradientError(f"the gradient is gone: {why}", where=f"parameter '{self.bucket.names[index]}'", fix=fix)


def grads_of(params: Iterable[torch.Tensor]) -> list[torch.Tensor | None]:
    """Each ``p.grad``, without a detour through the guards of released parameters: a step asks for many."""
    with torch._C.DisableTorchFunctionSubclass():
        return [p.grad for p in params]


def _is_kept(handles: Sequence[torch.Tensor] | None) -> bool:
    """Has the script one of these, which no ``p.grad`` shows? It may put it back."""
    return bool(handles) and _references(handles) > _references([object()])


def _references(items: Sequence[object] | None) -> int:
    """The most that anything in a list is referred to, the list and this look included."""
    return max(sys.getrefcount(item) for item in items or ())
