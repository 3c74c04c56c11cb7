"""A unit's parameters of one dtype in one flat buffer: values and master values. Their gradients: ``gradients.py``.

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

import torch
from torch import nn

from shardwise.comm.group import Op
from shardwise.comm.mesh import Mesh
from shardwise.engine.gradients import Gradients
from shardwise.layout import Layout, Piece
from shardwise.strategy import Strategy
from shardwise.tiers import Buffer, Ledger
from shardwise.tiers.home import All, Home
from shardwise.tiers.transfer import Transfer
from shardwise.tiers.values import Values

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def place_of(home: str, found: Home | None) -> str:
    """Where a home is, seen from the device: ``cpu`` is the device itself where that is one."""
    return "device" if found is None or (home == "cpu" and not found.separate) else home


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
        self.whole_tensors = strategy.layout == "tensor" or mesh.parts == 1  # a piece is a whole parameter
        self.share = 1.0 / mesh.parts
        steps = floating and any(p.requires_grad for p in params)
        params_home = place_of(strategy.offload_params, home)
        state_home = place_of(strategy.offload_optimizer, home) if steps and strategy.offload_ratio > 0 else "device"
        grads_home = place_of(strategy.offload_grads, home) if steps else "device"
        self.home = home if {params_home, state_home, grads_home} != {"device"} else None
        separate = self.home is not None and self.home.separate
        self.params_away, self.params_on_disk = params_home != "device", params_home == "nvme"
        self.state_on_disk = state_home == "nvme"
        # Master values, and the optimizer's step. With home ``cpu`` the ratio is one of whole units.
        nbytes = (mesh.held.stop - mesh.held.start) * self.layout.shard_numel * self.master_dtype.itemsize
        self.on_host = (
            self.home is not None
            and self.home.separate
            and (state_home == "nvme" or (state_home == "cpu" and self.home.takes(nbytes)))
        )
        self._read_on_host = separate and self.params_away  # what gathers read
        # Are master values another tensor than what gathers read?
        self.apart = self.home is not None and (self.dtype != self.master_dtype or self.on_host != self._read_on_host)
        self.split = (strategy.split_params and mesh.shard.size > 1) or self.params_away
        self.split_optimizer = strategy.split_optimizer and mesh.shard.size > 1
        self.overlap = strategy.offload_overlap
        self.tag = mesh.new_tag()
        self._ops = {kind: Op(kind, f"unit {label}", 8 * self.tag + i) for i, kind in enumerate(_KINDS)}
        self.held = slice(mesh.held.start * self.layout.shard_numel, mesh.held.stop * self.layout.shard_numel)
        self._take_values()
        self.pieces: list[list[Piece]] = [[] for _ in params]  # per parameter, those in the held shards
        for piece in self.layout.pieces:
            if piece.shard in mesh.held:
                self.pieces[piece.slot].append(piece)
        self.piece_params = [[self.view(piece) for piece in pieces] for pieces in self.pieces]
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
        grads_on_host = grads_home == "cpu"
        split_grads = (strategy.split_grads and mesh.shard.size > 1) or grads_on_host
        self.grads = Gradients(self, split=split_grads, on_host=grads_on_host)
        self.grads_cross = self.on_host != grads_on_host  # to be where the update is

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
                self.master = self.empty(n, self.master_dtype, on_host=self.on_host)
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
            self.shard = self.empty(self.master.numel(), self.dtype, on_host=self._read_on_host)
        elif self.apart and self.split:
            self.shard = self.ledger.empty(self.master.numel(), self.dtype, self.device, "parameters")
        if self.shard is not None:
            self.shard.copy_(self.master)
        for slot, p in zip(self.layout.slots, self.params, strict=True):
            p.data = self.flat.tensor[slot.offset : slot.stop].view(slot.shape)
            p.grad_dtype = None  # the reduced gradient has the master dtype, whatever we compute in

    def empty(self, numel: int, dtype: torch.dtype, *, on_host: bool) -> torch.Tensor:
        """Uninitialised memory on the device or at home on the host, not counted by the ledger."""
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
        copy = self.home.step_link.to_device(low, self.follower)
        copy.order()
        return [copy]

    @property
    def follower(self) -> torch.Tensor:
        """The values of the held shards, which follow master values that are ``apart``."""
        return self.flat.tensor[self.held] if self.shard is None else self.shard

    @contextmanager
    def master_here(self, *, write: bool = False) -> Iterator[torch.Tensor]:
        """The held master values, in memory inside the block. With ``write`` they may be changed; the values follow."""
        self.catch_up()
        if self.values is None:
            yield self.master
            return
        opened = not self.values.here
        self.values.materialise()
        try:
            yield self.master
            if write:
                All(self.follow_master()).wait()
        finally:
            if opened:
                self.values.settle()

    def catch_up(self) -> None:
        """Wait for an update that was asked for."""
        self.params[0]._shardwise_unit.catch_up()  # type: ignore[attr-defined]

    def full_values(self) -> torch.Tensor:
        """All values in the master dtype, in a new flat tensor (collective where values are split)."""
        out = torch.empty(self.layout.numel, dtype=self.master_dtype, device=self.device)
        with self.master_here() as master:
            out[self.held].copy_(master)
        with self.told("values"):
            self.mesh.gather(out, self.op("state")).wait()
        return out

    def told(self, kind: str) -> AbstractContextManager[None]:
        unit = self.params[0]._shardwise_unit  # type: ignore[attr-defined]
        return unit.engine.told("values", unit.index, unit.buckets.index(self), kind)

    def view(self, piece: Piece, base: torch.Tensor | None = None, origin: int | None = None) -> torch.Tensor:
        base = self.master if base is None else base
        at = piece.offset - (self.held.start if origin is None else origin)
        view = base.detach()[at : at + piece.numel]
        view = view.view(self.layout.slots[piece.slot].shape) if self.whole_tensors else view
        return view.data  # not a view to autograd: its base would keep the bytes of values that are away

    def ranges(self, index: int) -> list[tuple[int, int]]:
        """The ``start:stop`` of parameter ``index`` (flattened) that each of its held pieces covers."""
        return [(p.start, p.stop) for p in self.pieces[index]]

    def held_shards(self, index: int) -> list[int]:
        return [p.shard for p in self.pieces[index]]

    @torch.no_grad()
    def average(self) -> None:
        """Make the master values the mean of all ranks' own, and the values follow. Collective; whole states only."""
        with self.master_here(write=True) as master:
            mean = torch.empty_like(master, device=self.device)
            self.mesh.reduce(master.to(self.device, copy=True), mean, self.op("reduce"), self.ledger).wait()
            master.copy_(mean.div_(self.mesh.parts))
            if not self.aliased and not self.split:
                self.flat.tensor.copy_(master)


_KINDS = ("gather", "reduce", "broadcast", "norm", "state")
