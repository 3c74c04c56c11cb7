"""A unit's parameters of one dtype in one flat buffer: values, master values and gradients.

What a strategy splits decides only how long each buffer is and how long it lives:

================  =======================================  ===========================================
                  whole                                    split
================  =======================================  ===========================================
parameters        ``flat`` stays filled                    ``flat`` is filled by a gather, then released
master values     a view of ``flat`` (or own, if dtypes    the held shards, in the master dtype
                  differ)
gradients         reduced in place, ``flat``-sized         arrive in a temporary, reduced to held shards
optimizer state   one tensor per piece of all shards       one tensor per piece of the held shards
================  =======================================  ===========================================

Homes other than the device change where a buffer is, never what is computed from it. Parameters with another home are
kept as held shards there, and ``flat`` is filled from it and released as where they are split, also if each rank holds
all shards. Where what gathers read differs from the master values, in dtype or in place, there are two tensors: the
``shard`` at the home of parameters, and the master values at the home of optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

import torch
from torch import nn

from shardwise.comm.group import Op
from shardwise.comm.mesh import Mesh, Reduction
from shardwise.engine.grads import ShardedGrad
from shardwise.errors import GradientError
from shardwise.layout import Layout, Piece
from shardwise.strategy import Strategy
from shardwise.tiers import Buffer, Ledger
from shardwise.tiers.home import All, Home
from shardwise.tiers.transfer import Transfer
from shardwise.tiers.values import Values

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Bucket:
    """Parameters of one dtype, all trainable or all frozen when they were sharded.

    Args:
        label: what reports call it: the unit's name.
        params, names: the parameters and one full name of each.
        mesh, strategy: who holds what.
        ledger: counts the live bytes.
        home: of what the strategy offloads; ``None`` if that is nothing.
    """

    def __init__(
        self,
        label: str,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        mesh: Mesh,
        strategy: Strategy,
        ledger: Ledger,
        home: Home | None = None,
    ) -> None:
        self.label, self.params, self.names, self.mesh, self.ledger = label, list(params), list(names), mesh, ledger
        self.device, self.master_dtype = params[0].device, params[0].dtype
        floating = self.master_dtype.is_floating_point
        self.dtype = TORCH_DTYPES[strategy.param_dtype] if strategy.param_dtype and floating else self.master_dtype
        self.reduce_dtype = (
            TORCH_DTYPES[strategy.reduce_dtype] if strategy.reduce_dtype and floating else self.master_dtype
        )
        self.layout = Layout.plan(
            [(n, tuple(p.shape)) for n, p in zip(names, params, strict=True)], mesh.parts, strategy.layout
        )
        self.granularity = strategy.layout
        self.share = 1.0 / mesh.parts
        steps = floating and any(p.requires_grad for p in params)
        self.home = home if steps or strategy.offload_params != "device" else None
        separate = self.home is not None and self.home.separate
        params_home = "device" if self.home is None else strategy.offload_params
        state_home = strategy.offload_optimizer if steps and strategy.offload_ratio > 0 else "device"
        self.params_away, self.params_on_disk = params_home != "device", params_home == "nvme"
        self.state_on_disk = state_home == "nvme"
        self.on_host = separate and state_home != "device"  # master values, and the optimizer's step
        self._read_on_host = separate and self.params_away  # what gathers read
        # Are master values another tensor than what gathers read?
        self.apart = self.home is not None and (self.dtype != self.master_dtype or self.on_host != self._read_on_host)
        self.split = (strategy.split_params and mesh.shard.size > 1) or self.params_away
        self.split_grads = strategy.split_grads and mesh.shard.size > 1
        self.split_optimizer = strategy.split_optimizer and mesh.shard.size > 1
        self.tag = mesh.new_tag()
        self._ops = {kind: Op(kind, f"unit {label}", 8 * self.tag + i) for i, kind in enumerate(_KINDS)}
        self.held = slice(mesh.held.start * self.layout.shard_numel, mesh.held.stop * self.layout.shard_numel)
        n = len(params)
        self.valid = [False] * n  # reduced gradients of earlier backwards, not yet zeroed
        self.arrived = [False] * n  # gradients in ``raw``, not yet reduced
        self.seen = [False] * n  # gradients that arrived in this backward, reduced or not
        self.shown = [False] * n  # parameters that had a gradient before this backward
        self.grad: torch.Tensor | None = None  # reduced gradients
        self.raw: torch.Tensor | None = None  # arriving gradients, flat
        self._reducing: torch.Tensor | None = None  # the ``raw`` that is being reduced
        self.reduction: Reduction | None = None
        self._merge: torch.Tensor | None = None
        self._handles: list[torch.Tensor] | None = None
        self.spent = [False] * n  # gradients that an update in the backward has used up, not yet zeroed
        self._take_values()
        self.pieces: list[list[Piece]] = [[] for _ in params]  # per parameter, those in the held shards
        for piece in self.layout.pieces:
            if piece.shard in mesh.held:
                self.pieces[piece.slot].append(piece)
        self.piece_params = [[self._view(piece) for piece in pieces] for pieces in self.pieces]
        # Where each held piece begins in the held shards, in the order of ``piece_params``.
        self.piece_starts = [p.offset - self.held.start for pieces in self.pieces for p in pieces]
        views = list(zip(self.piece_starts, [view for pieces in self.piece_params for view in pieces], strict=True))
        # Master values, and what gathers read; ``None``: on the device.
        self.values: Values | None = None
        self.source: Values | None = None
        if self.apart:
            self.values = self._at_home("master values", self.master, self.state_on_disk, "optimizer", views)
            if self.params_away:
                assert self.shard is not None
                self.source = self._at_home("parameters", self.shard, self.params_on_disk, "parameters")
        elif self.params_away:
            self.values = self._at_home("parameters", self.master, self.params_on_disk, "parameters", views)
            self.source = self.values
        self._arriving: list[Transfer] | None = None

    def _at_home(
        self, what: str, tensor: torch.Tensor, disk: bool, state: str, views: Sequence[tuple[int, torch.Tensor]] = ()
    ) -> Values:
        assert self.home is not None
        return Values(self.home, f"unit {self.label} {what}", tensor, views, disk=disk, state=state)

    def op(self, kind: str) -> Op:
        return self._ops[kind]

    # --- values ------------------------------------------------------------------------------
    @torch.no_grad()
    def _take_values(self) -> None:
        """Move the parameters' values into the flat buffer, rank 0's for everyone, and keep what is held."""
        alias = not self.split and not self.apart and self.dtype == self.master_dtype
        state = "gather_buffers" if self.split else "parameters"
        whole = Buffer(self.layout.numel, self.master_dtype, self.device, state, self.ledger)
        values = whole.tensor
        for lo, hi in self.layout.gaps:
            values[lo:hi].zero_()
        for slot, p in zip(self.layout.slots, self.params, strict=True):
            values[slot.offset : slot.stop].copy_(p.detach().reshape(-1))
        self.mesh.whole.broadcast(values, self.op("broadcast")).wait()
        if alias:
            self.flat, self.master = whole, values[self.held]
        else:
            n = self.held.stop - self.held.start
            if self.apart or self.params_away:  # counted by what takes it home
                self.master = self._empty(n, self.master_dtype, self.on_host)
            else:
                kept = "parameters" if self.split else "optimizer"
                self.master = self.ledger.empty(n, self.master_dtype, self.device, kept)
            self.master.copy_(values[self.held])
            if self.dtype == self.master_dtype:
                self.flat = whole
            else:
                self.flat = Buffer(self.layout.numel, self.dtype, self.device, state, self.ledger)
                self.flat.tensor.copy_(values)
                whole.release()
        self.aliased = alias
        self.shard: torch.Tensor | None = None  # what gathers read, where that is not the master values
        if self.apart and self.params_away:
            self.shard = self._empty(self.master.numel(), self.dtype, self._read_on_host)
        elif self.apart and self.split:
            self.shard = self.ledger.empty(self.master.numel(), self.dtype, self.device, "parameters")
        if self.shard is not None:
            self.shard.copy_(self.master)
        for slot, p in zip(self.layout.slots, self.params, strict=True):
            p.data = self.flat.tensor[slot.offset : slot.stop].view(slot.shape)
            p.grad_dtype = None  # the reduced gradient has the master dtype, whatever we compute in

    def _empty(self, numel: int, dtype: torch.dtype, on_host: bool) -> torch.Tensor:
        if not on_host:
            return torch.empty(numel, dtype=dtype, device=self.device)
        assert self.home is not None
        return torch.empty(numel, dtype=dtype, pin_memory=self.home.pin)

    def stage(self) -> None:
        """Begin to bring held shards from their home into ``flat``, if that is where they are."""
        if self.source is not None and self._arriving is None:
            self.flat.fill()
            self._arriving = self.source.fill(self.flat.tensor[self.held])

    def unstage(self) -> None:
        """Nobody gathers what was staged: let it go."""
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            All(arriving).wait()
            self.flat.release()

    def start_gather(self) -> Transfer:
        """Fill ``flat`` from the shards of the shard axis. Sends (S-1)/S of it."""
        if self.source is not None:
            self.stage()
            assert self._arriving is not None
            arriving, self._arriving = All(self._arriving), None
            if self.mesh.shard.size == 1:
                return arriving
            arriving.wait()  # here, not later: all ranks start their collectives in the same order
        else:
            self.flat.fill()
            if self.shard is not None:
                self.flat.tensor[self.held].copy_(self.shard)
            elif not self.aliased and not self.apart:
                self.flat.tensor[self.held].copy_(self.master)
        return self.mesh.gather(self.flat.tensor, self.op("gather"))

    def follow_master(self, low: torch.Tensor | None = None) -> list[Transfer]:
        """Master values that are ``apart`` were written to and are still here: let what gathers read follow.

        Args:
            low: ``(held shards,)`` in the compute dtype, host memory they may pass through. It must not change before
                the transfers have ended.
        """
        if not self.apart:
            return []
        on_disk = self.source is not None and self.source.on_disk
        if low is None and on_disk:
            low = torch.empty(self.master.numel(), dtype=self.dtype)
        if low is None or (self.source is not None and not on_disk):
            self.follower.copy_(self.master)
            return []
        low.copy_(self.master)
        if self.source is not None:
            return self.source.write(low.view(torch.uint8))
        assert self.home is not None
        copy = self.home.link.to_device(low, self.follower)
        copy.order()
        return [copy]

    @property
    def follower(self) -> torch.Tensor:
        """The values of the held shards, which follow master values that are ``apart``."""
        return self.flat.tensor[self.held] if self.shard is None else self.shard

    @contextmanager
    def master_here(self, *, write: bool = False) -> Iterator[torch.Tensor]:
        """The held master values, in memory inside the block. With ``write`` they may be changed; the values follow."""
        if self.values is None:
            yield self.master
            return
        opened = not self.values.here
        self.values.materialise()
        yield self.master
        if write:
            All(self.follow_master()).wait()
        if opened:
            self.values.settle()

    def full_values(self) -> torch.Tensor:
        """All values in the master dtype, in a new flat tensor (collective where values are split)."""
        out = torch.empty(self.layout.numel, dtype=self.master_dtype, device=self.device)
        with self.master_here() as master:
            out[self.held].copy_(master)
        with self._told("values"):
            self.mesh.gather(out, self.op("state")).wait()
        return out

    def _told(self, kind: str) -> AbstractContextManager[None]:
        unit = self.params[0]._shardwise_unit  # type: ignore[attr-defined]
        return unit.engine.told("values", unit.index, unit.buckets.index(self), kind)

    def full_grads(self) -> torch.Tensor:
        """All reduced gradients in a new flat tensor (collective where they are split)."""
        out = torch.zeros(self.layout.numel, dtype=self.master_dtype, device=self.device)
        if self.grad is not None:
            out[self.held].copy_(self._held_grad(self.grad))
        if self.split_optimizer:
            with self._told("gradients"):
                self.mesh.gather(out, self.op("state")).wait()
        return out

    def _view(self, piece: Piece, base: torch.Tensor | None = None, origin: int | None = None) -> torch.Tensor:
        base = self.master if base is None else base
        at = piece.offset - (self.held.start if origin is None else origin)
        view = base.detach()[at : at + piece.numel]
        view = view.view(self.layout.slots[piece.slot].shape) if self.granularity == "tensor" else view
        return view.data  # not a view to autograd: its base would keep the bytes of values that are away

    def ranges(self, index: int) -> list[tuple[int, int]]:
        """The ``start:stop`` of parameter ``index`` (flattened) that each of its held pieces covers."""
        return [(p.start, p.stop) for p in self.pieces[index]]

    def held_shards(self, index: int) -> list[int]:
        return [p.shard for p in self.pieces[index]]

    # --- gradients -----------------------------------------------------------------------------
    def _open_grad(self) -> torch.Tensor:
        if self.grad is None:
            n = self.held.stop - self.held.start if self.split_grads else self.layout.numel
            self.grad = self.ledger.empty(n, self.master_dtype, self.device, "gradients").zero_()
            origin = self.held.start if self.split_grads else 0
            self._piece_grads = [[self._view(p, self.grad, origin) for p in ps] for ps in self.pieces]
        return self.grad

    def _held_grad(self, grad: torch.Tensor) -> torch.Tensor:
        return grad if self.split_grads else grad[self.held]

    def piece_grads(self, index: int) -> list[torch.Tensor]:
        """Views of the reduced gradient of parameter ``index``, one per held piece."""
        self._open_grad()
        return self._piece_grads[index]

    def read_flags(self) -> None:
        """Before a backward: forget what the user has zeroed (``p.grad is None``), hide the rest from autograd."""
        for i, p in enumerate(self.params):
            self.shown[i] = p.grad is not None
            if p.grad is None or self.spent[i]:
                if p.grad is not None:
                    self._refuse_spent(i)
                self.spent[i] = False
                self.valid[i] = self.arrived[i] = self.seen[i] = False
            else:
                if self._handles is None or p.grad is not self._handles[i]:
                    self._adopt(i, p.grad)
                p.grad = None
        if self.raw is not None and not any(self.arrived):
            self._close(self.raw)
            self.raw = None

    def _adopt(self, i: int, grad: torch.Tensor) -> None:
        """Take over a gradient that the user put into ``p.grad``."""
        self.valid[i] = True
        for (lo, hi), piece in zip(self.ranges(i), self.piece_grads(i), strict=True):
            piece.copy_(grad.detach().reshape(-1)[lo:hi].view(piece.shape))

    def _open_raw(self) -> torch.Tensor:
        """The flat buffer gradients arrive in: the whole gradient itself where that is kept and empty."""
        in_place = not self.split_grads and self.reduce_dtype == self.master_dtype
        if in_place and self.reduction is None and not any(self.valid):
            return self._open_grad()
        return self.ledger.empty(self.layout.numel, self.reduce_dtype, self.device, "gather_buffers")

    def _close(self, raw: torch.Tensor) -> None:
        if raw is not self.grad:
            self.ledger.drop(raw, "gather_buffers")

    def arrive(self, index: int, grad: torch.Tensor) -> None:
        """Copy one gradient into its place as autograd hands it over."""
        if self.raw is None:
            self.raw = self._open_raw()
        slot = self.layout.slots[index]
        place = self.raw[slot.offset : slot.stop].view(slot.shape)
        # The mean is taken here, in the pass that copies anyway, so that a reduce is a plain sum.
        if self.arrived[index]:
            place.add_(grad, alpha=self.share)
            return
        self.arrived[index] = self.seen[index] = True
        if grad.dtype == place.dtype:
            torch.mul(grad, self.share, out=place)
        else:
            place.copy_(grad).mul_(self.share)

    def launch_reduce(self) -> None:
        """Start reducing what arrived; parameters without a gradient on this rank count as zeros."""
        self.finish_reduce()
        raw = self.raw if self.raw is not None else self._open_raw()
        self.raw, self._reducing = None, raw
        for i, slot in enumerate(self.layout.slots):
            if not self.arrived[i]:
                raw[slot.offset : slot.stop].zero_()
        if raw is self.grad:
            out = raw[self.held]
        elif any(self.valid):
            n = self.held.stop - self.held.start
            out = self._merge = self.ledger.empty(n, self.master_dtype, self.device, "gather_buffers")
        else:
            out = self._held_grad(self._open_grad())
        self.reduction = self.mesh.reduce(raw, out, self.op("reduce"), self.ledger)
        self.arrived = [False] * len(self.params)

    def finish_reduce(self) -> None:
        """Wait for the reduce and add its result to what was already there."""
        if self.reduction is None:
            return
        self.reduction.wait()
        self.reduction = None
        assert self._reducing is not None
        self._close(self._reducing)
        self._reducing = None
        if self._merge is not None:
            assert self.grad is not None
            held = self._held_grad(self.grad)
            for piece in (p for pieces in self.pieces for p in pieces):
                at = piece.offset - self.held.start
                into, add = held[at : at + piece.numel], self._merge[at : at + piece.numel]
                into.add_(add) if self.valid[piece.slot] else into.copy_(add)
            self.ledger.drop(self._merge, "gather_buffers")
            self._merge = None
        self.valid = [True] * len(self.params)

    def keep(self) -> None:
        """Take what arrived as it is, without the other ranks. For whole gradients."""
        raw, grad = self.raw, self._open_grad()
        if raw is None:
            return
        for i, slot in enumerate(self.layout.slots):
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
        self.valid = [True] * len(self.params)
        self.arrived, self.seen = [False] * len(self.params), [False] * len(self.params)

    @torch.no_grad()
    def average(self) -> None:
        """Make the master values the mean of all ranks' own, and the values follow. Collective; whole states only."""
        with self.master_here(write=True) as master:
            mean = torch.empty_like(master, device=self.device)
            self.mesh.reduce(master.to(self.device, copy=True), mean, self.op("reduce"), self.ledger).wait()
            master.copy_(mean.div_(self.mesh.parts))
            if not self.aliased and not self.split:
                self.flat.tensor.copy_(master)

    def abandon(self) -> None:
        """Drop gradients that arrived in a backward that failed. Reduced ones of earlier backwards stay."""
        if self.reduction is not None:
            keep = self.valid
            self.finish_reduce()
            self.valid = keep
        if self.raw is not None:
            self._close(self.raw)
            self.raw = None
        self.arrived = [False] * len(self.params)
        self.seen = [False] * len(self.params)

    def show(self, index: int, param: nn.Parameter) -> None:
        """Put the gradient's public face into ``p.grad``."""
        if self.spent[index]:
            param.grad = ShardedGrad(self, index)
            return
        if self._handles is None:
            grad = self._open_grad()
            if self.split_optimizer:
                self._handles = [ShardedGrad(self, i) for i in range(len(self.params))]
            else:
                self._handles = [grad[s.offset : s.stop].view(s.shape) for s in self.layout.slots]
        param.grad = self._handles[index]

    def step_grads(self, index: int) -> list[torch.Tensor] | None:
        """What the optimizer sees for each held piece of a parameter; ``None`` if it has no gradient."""
        param = self.params[index]
        grad = param.grad
        if grad is None or (self.spent[index] and isinstance(grad, ShardedGrad)):
            return None
        self.require_reduced(index)
        if self._handles is None or grad is not self._handles[index]:
            self._adopt(index, grad)
        return self.piece_grads(index)

    def held_grad(self) -> torch.Tensor:
        """The reduced gradients of the held shards, flat."""
        return self._held_grad(self._open_grad())

    def require_reduced(self, index: int) -> None:
        """Raise if gradients wait for a reduce (inside ``no_sync``): a step now would let ranks diverge.

        Or if there are none any more, because an update in the backward has used them up.
        """
        if self.spent[index]:
            self._refuse_spent(index)
        if self.arrived[index]:
            raise GradientError(
                "the gradient has not been reduced over the ranks yet: its last backward ran under no_sync()",
                where=f"parameter '{self.names[index]}'",
                fix="run the last micro-batch's backward outside no_sync() before clipping or stepping",
            )

    def _refuse_spent(self, index: int) -> NoReturn:
        raise GradientError(
            "the gradient is gone: its update took place during the backward (optimizer_in_backward)",
            where=f"parameter '{self.names[index]}'",
            fix="clear gradients after each step; leave optimizer_in_backward out to clip, scale or read gradients, "
            "or to let them add up",
        )

    def spend(self) -> None:
        """An update has used the gradients up: free them, and let ``p.grad`` say so."""
        assert self.grad is not None
        self.ledger.drop(self.grad, "gradients")
        self.grad = self._handles = None
        self._piece_grads = []
        n = len(self.params)
        self.valid, self.spent = [False] * n, [True] * n

    def zero_grad(self, index: int) -> None:
        """Zero in place, as ``p.grad.zero_()`` asks."""
        if self.spent[index]:
            self.params[index].grad = None
            return
        for piece in self.piece_grads(index):
            piece.zero_()
        if self.raw is not None and self.arrived[index]:
            slot = self.layout.slots[index]
            self.raw[slot.offset : slot.stop].zero_()


_KINDS = ("gather", "reduce", "broadcast", "norm", "state")
