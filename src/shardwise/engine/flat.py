"""A unit's parameters of one dtype in one flat buffer: values and master values. Their gradients: ``gradients.py``.

Which buffers there are, and where, says the :class:`~shardwise.placement.Placement`; here they are made, filled and
freed. It knows nothing of modules, hooks or the order of things.

::

    values   (parts * n,)   the flat buffer that the parameters are views of, in the dtype to compute in
    master   (copies * n,)  the held shards in the master dtype: what the optimizer updates
    shard    (copies * n,)  what gathers read, where that is not the master values

with ``n`` elements per shard, ``parts`` ranks, and ``copies`` ranks along the replicate axis.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardwise.comm.mesh import CopyTag, Mesh
from shardwise.comm.stats import Number, Op
from shardwise.layout import Layout, Piece
from shardwise.placement import DTYPE_NAMES, Placement, Ranks, Where, place
from shardwise.strategy import Strategy
from shardwise.tiers import Buffer, Ledger
from shardwise.tiers.home import Home
from shardwise.tiers.offloaded_values import OffloadedValues, ValuesSource
from shardwise.tiers.transfer import Transfer, TransferGroup

if TYPE_CHECKING:
    from typing_extensions import Self

TORCH_DTYPES = {name: getattr(torch, full) for name, full in DTYPE_NAMES.items()}
_KINDS = ("gather", "reduce", "broadcast", "norm", "state")


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


class FlatParameters:
    """Parameters of one dtype, all trainable or all frozen when they were sharded.

    Args:
        label: what reports call it: the unit's name.
        params, names: the parameters and one full name of each.
        mesh, strategy: who holds what.
        ledger: counts the live bytes.
        home: of what the strategy offloads; ``None`` if that is nothing.
        reconcile: called before master values are read or written past the schedule: an update that is under way has to
            take place first, and what the script wrote to values has to reach them.
        finish_transfers: waits for updates and for a gather that is under way.
        finish_update: called before gradients are read or written: an update may be using them.
        compute_dtype: overrides the strategy's ``param_dtype``; ``None`` does not.

    Attributes:
        placement: which buffers there are, where, and when.
        compute_dtype: the name of the dtype that its values must have; ``None``: as the strategy says.
        layout: which element of which parameter is where in the flat buffer.
        held: the range of the flat buffer that this rank holds: ``copies * n`` elements.
        flat: values, ``(parts * n,)`` in ``dtype``. Empty while released.
        master: ``(copies * n,)`` in ``master_dtype``. A view of ``flat`` where the placement says ``aliased``.
        shard: ``(copies * n,)`` in ``dtype``, or ``None``: gathers read ``master``.
        values, source: the homes of ``master`` and of what gathers read; ``None``: the device.
        pieces: per parameter, its parts in the held shards; ``piece_params`` are views of ``master`` at them, and
            the optimizer's parameters; ``piece_starts`` where each begins in ``master``, in the same order.
        offsets: index and offset in bytes of each parameter that has elements.
        gathers_after_step: values that stay follow the master values by a copy or a gather after each step.
        wire_bytes: of its gradients, whole, as they cross the wire.
        share: factor that makes a sum over ranks the mean.
        place: among all buckets, in the order in which they were made, equal on all ranks; a copy has its original's.
    """

    read_only = False
    """Are the values weights of files, which nobody trains?"""

    def __init__(
        self,
        label: str,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        mesh: Mesh,
        strategy: Strategy,
        ledger: Ledger,
        home: Home | None = None,
        reconcile: Callable[[], None] = lambda: None,
        finish_transfers: Callable[[], None] = lambda: None,
        finish_update: Callable[[], None] = lambda: None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.label, self.params, self.names, self.mesh, self.ledger = label, list(params), list(names), mesh, ledger
        self.device, self.master_dtype = params[0].device, params[0].dtype
        self.reconcile, self.finish_transfers, self.finish_update = reconcile, finish_transfers, finish_update
        shapes = [(n, tuple(p.shape)) for n, p in zip(names, params, strict=True)]
        self._set_layout(Layout.plan(shapes, mesh.parts, strategy.layout))
        self.granularity = strategy.layout
        self.whole_tensors = strategy.layout == "tensor" or mesh.parts == 1  # a piece is a whole parameter
        self.share = 1.0 / mesh.parts
        self.compute_dtype = None if compute_dtype is None else dtype_name(compute_dtype)
        self.placement = self._place(strategy, home)
        plan = self.placement
        self.gathers_after_step = not plan.released and (not plan.aliased or plan.split_state)
        self.home = home if plan.steps_apart else None
        self.dtype: torch.dtype = getattr(torch, self.placement.values.dtype)
        self.reduce_dtype: torch.dtype = getattr(torch, self.placement.wire_dtype)
        self.wire_bytes = self.layout.numel * self.reduce_dtype.itemsize
        width = self.dtype.itemsize
        self.offsets = [(i, slot.offset * width) for i, slot in enumerate(self.layout.slots) if slot.numel]
        self.overlap = strategy.offload_overlap
        self.place = mesh.new_tag()
        self._copy_tag: CopyTag | None = None
        self._name_messages()
        self._versions: list[int] = []  # of the parameters when master values and values last agreed
        self._take_values()
        self.pieces: list[list[Piece]] = [[] for _ in params]
        for piece in self.layout.pieces:
            if piece.shard in mesh.held:
                self.pieces[piece.slot].append(piece)
        self.piece_params = self._cut_master()
        self.piece_starts = [p.offset - self.held.start for pieces in self.pieces for p in pieces]
        self.values: OffloadedValues | None = None
        self.source: ValuesSource | None = None
        self._send_home()
        self._arriving: list[Transfer] | None = None  # shards that were staged, on their way into ``flat``

    def _set_layout(self, layout: Layout) -> None:
        self.layout, held = layout, self.mesh.held
        self._by_start = sorted(
            (i for i, s in enumerate(layout.slots) if s.numel), key=lambda i: layout.slots[i].offset
        )
        self._starts = [layout.slots[i].offset for i in self._by_start]
        self.held = slice(held.start * layout.shard_numel, held.stop * layout.shard_numel)

    def _name_messages(self, more: str = "") -> None:
        self._ops = {kind: Op(kind, f"unit {self.label}{more}", self.number(i)) for i, kind in enumerate(_KINDS)}

    def _place(self, strategy: Strategy, home: Home | None) -> Placement:
        mesh, trainable = self.mesh, any(p.requires_grad for p in self.params)
        floating = self.master_dtype.is_floating_point
        separate = home.separate if home is not None else self.device.type != "cpu"
        takes = True
        if home is not None and separate and strategy.offload_optimizer == "cpu" and trainable and floating:
            # With home ``cpu`` the ratio is one of whole units.
            takes = home.takes((self.held.stop - self.held.start) * self.master_dtype.itemsize)
        return place(
            strategy if home is not None else strategy.replace(**_ON_DEVICE),
            Ranks(mesh.parts, mesh.shard.size),
            dtype_name(self.master_dtype),
            trainable=trainable,
            floating=floating,
            separate=separate,
            takes_state=takes,
            compute_dtype=self.compute_dtype,
        )

    @property
    def trains(self) -> bool:
        """Can some of its parameters get a gradient?"""
        return self.placement.trainable or any(p.requires_grad for p in self.params)

    def op(self, kind: str) -> Op:
        return self._ops[kind]

    def number(self, which: int) -> Number:
        """The tag of one kind of its messages; there are eight."""
        copy = self._copy_tag
        return 8 * self.place + which if copy is None else lambda: 8 * copy() + which

    # --- making it ---------------------------------------------------------------------------------
    @torch.no_grad()
    def _take_values(self) -> None:
        """Move the parameters' values into the flat buffer, rank 0's for everyone, and keep what is held."""
        plan = self.placement
        state = "gather_buffers" if plan.released else "parameters"
        whole = Buffer(self.layout.numel, self.master_dtype, self.device, state, self.ledger)
        values = whole.tensor
        for lo, hi in self.layout.gaps:
            values[lo:hi].zero_()
        for slot, p in zip(self.layout.slots, self.params, strict=True):
            values[slot.offset : slot.stop].copy_(p.detach().reshape(-1))
        self.mesh.whole.broadcast(values, self.op("broadcast")).wait()
        if plan.aliased:
            self.flat, self.master = whole, values[self.held]
        else:
            n = self.held.stop - self.held.start
            if plan.shard is not None or plan.follows_home or plan.params_offloaded:  # counted by what takes it home
                self.master = self.empty(n, self.master_dtype, on_host=plan.step_on_host)
            else:
                kept = "parameters" if plan.released else "optimizer"
                self.master = self.ledger.empty(n, self.master_dtype, self.device, kept)
            self.master.copy_(values[self.held])
            if self.dtype == self.master_dtype:
                self.flat = whole
            else:
                self.flat = Buffer(self.layout.numel, self.dtype, self.device, state, self.ledger)
                self.flat.tensor.copy_(values)
                whole.release()
        self.shard: torch.Tensor | None = None
        if plan.shard is not None and plan.params_offloaded:
            self.shard = self.empty(n, self.dtype, on_host=plan.separate)
        elif plan.shard is not None:
            self.shard = self.ledger.empty(n, self.dtype, self.device, "parameters")
        if self.shard is not None:
            self.shard.copy_(self.master)
        for i, p in enumerate(self.params):
            self.attach(i, p)
        self.note()

    def attach(self, index: int, param: nn.Parameter) -> None:
        """Let ``param`` be a view of its slot in the flat buffer."""
        slot = self.layout.slots[index]
        self.params[index] = param
        param.data = self.flat.tensor[slot.offset : slot.stop].view(slot.shape)
        param.grad_dtype = None  # the reduced gradient has the master dtype, whatever we compute in
        self.flat.owners = len(self.params)

    @torch.no_grad()
    def copied(
        self,
        params: Sequence[nn.Parameter],
        ledger: Ledger,
        reconcile: Callable[[], None],
        finish_transfers: Callable[[], None],
        finish_update: Callable[[], None],
    ) -> Self:
        """The same buffers once more, with values of their own, for other parameters. Nothing is sent.

        Args:
            params: the copies of the parameters, in the same order.
            ledger, reconcile, finish_transfers, finish_update: as for a new one.
        """
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        plan = self.placement
        new.params, new.ledger = list(params), ledger
        new.reconcile, new.finish_transfers, new.finish_update = reconcile, finish_transfers, finish_update
        new._copy_tag = self.mesh.new_copy_tag()
        new._name_messages(" (a copy)")
        state = "gather_buffers" if plan.released else "parameters"
        new.flat = Buffer(self.layout.numel, self.dtype, self.device, state, ledger)
        if not plan.released:
            new.flat.tensor.copy_(self.flat.tensor)
        with self.master_here() as master:
            if plan.aliased:
                new.master = new.flat.tensor[self.held]
            elif self.values is None:
                kept = "parameters" if plan.released else "optimizer"
                new.master = ledger.empty(master.numel(), self.master_dtype, self.device, kept)
                new.master.copy_(master)
            else:
                new.master = self.empty(master.numel(), self.master_dtype, on_host=plan.step_on_host)
                new.master.copy_(master)
        if self.shard is not None:
            if plan.params_offloaded:
                new.shard = self.empty(self.shard.numel(), self.dtype, on_host=plan.separate)
            else:
                new.shard = ledger.empty(self.shard.numel(), self.dtype, self.device, "parameters")
            new.shard.copy_(new.master)
        new.piece_params = new._cut_master()
        new.values = new.source = new._arriving = None
        new._send_home()
        for i, p in enumerate(new.params):
            new.attach(i, p)
        new.note()
        if plan.released:
            new.flat.release()
        return new

    def _send_home(self) -> None:
        """What the strategy offloads goes to its home."""
        plan = self.placement
        views = list(zip(self.piece_starts, [view for pieces in self.piece_params for view in pieces], strict=True))
        if plan.follows_home:
            on_disk = plan.master.where is Where.DISK
            self.values = self._at_home("master values", self.master, on_disk, "optimizer", views)
            if plan.params_offloaded:
                assert self.shard is not None
                self.source = self._at_home("parameters", self.shard, plan.source.where is Where.DISK, "parameters")
        elif plan.params_offloaded:
            on_disk = plan.master.where is Where.DISK
            self.values = self._at_home("parameters", self.master, on_disk, "parameters", views)
            self.source = self.values

    def _at_home(
        self, what: str, tensor: torch.Tensor, disk: bool, state: str, views: Sequence[tuple[int, torch.Tensor]] = ()
    ) -> OffloadedValues:
        assert self.home is not None
        return OffloadedValues(self.home, f"unit {self.label} {what}", tensor, views, disk=disk, state=state)

    def empty(self, numel: int, dtype: torch.dtype, *, on_host: bool) -> torch.Tensor:
        """Uninitialised memory on the device or at home on the host, not counted by the ledger."""
        if not on_host:
            return torch.empty(numel, dtype=dtype, device=self.device)
        assert self.home is not None
        return torch.empty(numel, dtype=dtype, pin_memory=self.home.pin)

    # --- gather and release --------------------------------------------------------------------------
    def fill(self) -> None:
        """Have memory for the values."""
        self.flat.fill()

    def filled(self) -> torch.Tensor:
        """``(parts * n,)`` memory for the values, which there is from now on."""
        self.fill()
        return self.flat.tensor

    def stage(self) -> None:
        """Begin to bring held shards from their home into ``flat``, if that is where they are."""
        if self.source is not None and self._arriving is None:
            self.fill()
            self._arriving = self.source.fill(self.flat.tensor[self.held])

    def unstage(self) -> None:
        """Nobody gathers what was staged: let it go."""
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            TransferGroup(arriving).wait()
            self.release()

    def start_gather(self) -> Transfer:
        """Fill ``flat`` from the shards of the shard axis. Sends (S-1)/S of it."""
        if self.source is not None:
            self.stage()
            assert self._arriving is not None
            arriving, self._arriving = TransferGroup(self._arriving), None
            if self.mesh.shard.size == 1:
                return arriving
            arriving.wait()  # here, not later: all ranks start their collectives in the same order
        else:
            held_bytes = self.layout.numel * self.dtype.itemsize // self.mesh.shard.size
            if self.placement.released and self.sends_own and self.mesh.shard.all_share(held_bytes):
                return self.mesh.shard.all_gather_late(self.own_shard(), self.filled, self.op("gather"))
            self.fill()
            if self.sends_own:
                self.flat.tensor[self.held].copy_(self.master if self.shard is None else self.shard)
        return self.mesh.gather(self.flat.tensor, self.op("gather"))

    @property
    def joins(self) -> bool:
        """May its gather share a message? Not if what it reads comes from another home."""
        return self.source is None and self.mesh.shard.size > 1

    @property
    def sends_own(self) -> bool:
        """Are the held values, too, put into ``flat`` by a gather? Otherwise they are there."""
        plan = self.placement
        return self.shard is not None or not (plan.aliased or plan.follows_home)

    def own_shard(self) -> torch.Tensor:
        """``(copies * n,)`` what a gather sends, in the dtype of the values."""
        if not self.sends_own:
            return self.flat.tensor[self.held]
        return self.master.to(self.dtype) if self.shard is None else self.shard

    def release(self) -> bool:
        """Free the values' bytes, unless the script has a view of them. Were they freed?"""
        if self.flat.nbytes and not self.flat.resizable and not self.flat.aliased:
            self.flat.replace()
            with torch._C.DisableTorchFunctionSubclass():
                for i, p in enumerate(self.params):
                    self.attach(i, p)
            self.note()
        return self.flat.release()

    # --- master values and what follows them -------------------------------------------------------------
    def follow_master(self, low: torch.Tensor | None = None) -> list[Transfer]:
        """Master values with a home were written to and are still here: let what gathers read follow.

        Args:
            low: ``(copies * n,)`` in the compute dtype, host memory they may pass through. It must not change before
                the transfers have ended.
        """
        if not self.placement.follows_home:
            return []
        on_disk = self.source is not None and self.source.on_disk
        if low is None and on_disk:
            low = torch.empty(self.master.numel(), dtype=self.dtype)
        if low is None or (self.source is not None and not on_disk):
            if self.source is not None:
                self.source.settle()
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
        """``(copies * n,)`` the values of the held shards, which follow master values that are another tensor."""
        return self.flat.tensor[self.held] if self.shard is None else self.shard

    @contextmanager
    def master_here(self, *, write: bool = False) -> Iterator[torch.Tensor]:
        """The held master values, in memory inside the block. With ``write`` they may be changed; the values follow."""
        self.reconcile()
        if self.values is None:
            yield self.master
            return
        opened = not self.values.resident
        self.values.materialise()
        if write:
            self.values.settle()
        try:
            yield self.master
            if write:
                TransferGroup(self.follow_master()).wait()
        finally:
            if opened:
                self.values.write_back()

    def require_writable(self) -> None:
        """Raise where what is written to the values cannot be kept."""

    @property
    def fixed(self) -> bool:
        """Do the values have one address, for good?"""
        return not (self.placement.released or self.mesh.world.fake)

    def moved(self) -> list[int]:
        """The parameters (by index) that are no views of ``flat`` any more."""
        params, flat = self.params, self.flat
        with torch._C.DisableTorchFunctionSubclass():
            if self.mesh.world.fake:  # tensors without addresses
                key = flat.key
                return [i for i, p in enumerate(params) if p.untyped_storage()._cdata != key or not p.is_contiguous()]
            start = flat.tensor.data_ptr()  # 0 while its bytes are free
            return [i for i, at in self.offsets if params[i].data_ptr() != start + at or not params[i].is_contiguous()]

    # --- values that the script writes to ------------------------------------------------------------------
    def note(self) -> None:
        """Values and master values agree: whatever is written to the parameters from here on is the script's."""
        with torch._C.DisableTorchFunctionSubclass():
            self._versions = [p._version for p in self.params]

    def written(self) -> list[int]:
        """The parameters (by index) that were written to in place since :meth:`note`."""
        with torch._C.DisableTorchFunctionSubclass():
            return [i for i, p in enumerate(self.params) if p._version != self._versions[i]]

    @torch.no_grad()
    def take_values(self) -> None:
        """The script wrote to values, which are here: let the master values follow, where they differ.

        An element whose value is what its master value rounds to keeps the master value to the last bit.
        """
        if not self.placement.aliased:
            with self.master_here(write=True) as master:
                mine = self.flat.tensor[self.held].to(master.device)
                if mine.dtype == master.dtype:
                    master.copy_(mine)
                else:
                    torch.where(_are_others(mine, master), mine.to(master.dtype), master, out=master)
        self.note()

    @torch.no_grad()
    def as_written(self, full: torch.Tensor) -> torch.Tensor:
        """All master values, except where the values of this rank, which stay, are others.

        ``p.data.copy_()`` is not seen when it happens, and on one rank alone is no change of the model's: so a script
        puts averaged values in to save them, and takes them out again.
        """
        values = self.flat.tensor
        changed = _are_others(values, full)
        return torch.where(changed, values.to(full.dtype), full) if bool(changed.any()) else full

    @torch.no_grad()
    def differs(self) -> bool:
        """Are the held values, which are here, other than what the master values say?

        What a gather reads from a disk is read once more, and compared.
        """
        if self.placement.aliased:
            return False
        if self.source is not None and self.source.on_disk:
            self.reconcile()
            source = self.source.copied()
            return not torch.equal(_bits(self.flat.tensor[self.held].to(source.device)), _bits(source))
        with self.master_here() as master:
            mine = self.flat.tensor[self.held].to(master.device)
            return not torch.equal(_bits(mine), _bits(master.to(mine.dtype)))

    @torch.no_grad()
    def average(self) -> None:
        """Make the master values the mean of all ranks' own, and the values follow. Collective; whole states only."""
        with self.master_here(write=True) as master:
            mean = torch.empty_like(master, device=self.device)
            self.mesh.reduce(master.to(self.device, copy=True), mean, self.op("reduce"), self.ledger).wait()
            master.copy_(mean.div_(self.mesh.parts))
            if not self.placement.aliased and not self.placement.released:
                self.flat.tensor.copy_(master)

    # --- pieces ------------------------------------------------------------------------------------------
    def _cut_master(self) -> list[list[torch.Tensor]]:
        """Per parameter, what the optimizer updates. Of a settled bucket that is the parameter."""
        if self.placement.settled:
            return [[p] if pieces else [] for p, pieces in zip(self.params, self.pieces, strict=True)]
        return [[self.view(piece) for piece in pieces] for pieces in self.pieces]

    def slot_at(self, offset: int) -> int | None:
        """The parameter (by index) that an element of the flat buffer belongs to, if it belongs to one."""
        at = bisect_right(self._starts, offset) - 1
        index = self._by_start[at] if at >= 0 else None
        return index if index is not None and offset < self.layout.slots[index].stop else None

    def view(self, piece: Piece, base: torch.Tensor | None = None, origin: int | None = None) -> torch.Tensor:
        """A piece of ``base`` (default: the master values), which begins ``origin`` elements into the flat buffer."""
        base = self.master if base is None else base
        at = piece.offset - (self.held.start if origin is None else origin)
        view = base.detach()[at : at + piece.numel]
        view = view.view(self.layout.slots[piece.slot].shape) if self.whole_tensors else view
        return view.data  # not a view to autograd: its base would keep the bytes of values that are elsewhere

    def ranges(self, index: int) -> list[tuple[int, int]]:
        """The ``start:stop`` of parameter ``index`` (flattened) that each of its held pieces covers."""
        return [(p.start, p.stop) for p in self.pieces[index]]

    def held_shards(self, index: int) -> list[int]:
        """The shards that the held pieces of parameter ``index`` lie in."""
        return [p.shard for p in self.pieces[index]]


_ON_DEVICE = {"offload_params": "device", "offload_grads": "device", "offload_optimizer": "device"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _are_others(values: torch.Tensor, masters: torch.Tensor) -> torch.Tensor:
    """Where values are not what their master values round to."""
    return _bits(values) != _bits(masters.to(values.dtype))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, which compare as bytes do."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    kind = _INTEGERS.get(tensor.element_size())
    return tensor if kind is None or not tensor.is_floating_point() else tensor.view(kind)
