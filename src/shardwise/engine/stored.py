"""Buckets whose values are weights in files, which never change: for running models that nobody trains.

All of a unit's parameters are in one flat buffer of bytes, whatever their dtypes. What lies in a row in a file lies in
the same row in the buffer, at the same place within a block of the disk: so a unit is read by a few long requests,
straight to where its parameters are, and nothing is copied or rearranged. Gaps between its tensors are read as well if
they are short. What is in several pieces comes behind that, and goes through the reading threads' own buffers; what has
to be converted is read by a thread that converts.

The buffer is cut into equal shards as any other: of a split model each rank reads its part of the bytes, and a gather
brings the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from shardwise.comm.mesh import Mesh
from shardwise.engine.bucket import Bucket
from shardwise.errors import UnitError
from shardwise.layout import Layout, Slot, row_strides
from shardwise.placement import Ranks, place
from shardwise.quantization.others import bring_meaning
from shardwise.strategy import Strategy
from shardwise.tiers import Buffer, Ledger
from shardwise.tiers.aligned import ALIGN, padded
from shardwise.tiers.home import Home
from shardwise.tiers.offloaded_values import OffloadedValues
from shardwise.tiers.page_buffer import PageBuffer, PagePool
from shardwise.tiers.stored_files import StoredFiles, Task
from shardwise.tiers.stored_values import Part, StoredValues
from shardwise.tiers.transfer import Transfer, TransferGroup

GAP = 256 << 10
"""Bytes between two tensors of a unit that are read along, rather than beginning another request."""
_SLOT = 64  # bytes; where converted values begin, as torch's own allocator places tensors


class FilePiece(NamedTuple):
    """Bytes of a tensor that lie in a row in a file: ``nbytes`` from ``at`` on are its bytes from ``start`` on."""

    file: Path
    at: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """Where the values of one parameter are.

    Args:
        dtype: that the parameter has.
        shape: likewise.
        pieces: its bytes, in row-major order and of that dtype; empty: they have to be converted.
        other: its bytes in another dtype, where they lie in a row: read past the page cache, and converted.
        convert: ``convert(start, stop, out)`` fills ``out``, 1-D in ``dtype`` and on the CPU, with elements
            ``start:stop`` of the flattened tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[FilePiece, ...]
    convert: Callable[[int, int, torch.Tensor], None]
    other: tuple[FilePiece, torch.dtype] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRun:
    """Bytes of a file that lie in a row in the flat buffer.

    Args:
        start, nbytes, offset: multiples of the disk's block.
        end: of the last tensor's bytes in the file.
    """

    file: Path
    start: int
    nbytes: int
    offset: int
    end: int

    def overlap(self, lo: int, hi: int) -> tuple[int, int]:
        """Which of the flat buffer's bytes ``lo:hi`` it fills."""
        return max(lo, self.offset), min(hi, self.offset + self.nbytes)


@dataclass(frozen=True)
class PackedSlot:
    """Values that are not as they are in one file: of several pieces, or to be converted. From byte ``offset`` on."""

    tensor: StoredTensor
    offset: int

    def elements(self, lo: int, hi: int) -> tuple[int, int]:
        """Which of its elements begin in the flat buffer's bytes ``lo:hi``, which are cut between elements."""
        width = self.tensor.dtype.itemsize
        return max(0, (lo - self.offset) // width), min(prod(self.tensor.shape), (hi - self.offset) // width)


@dataclass(frozen=True)
class StoredLayout:
    """What of which file is where in a unit's flat buffer of bytes.

    Args:
        layout: in bytes: a slot's shape is ``(nbytes,)``.
    """

    layout: Layout
    runs: tuple[FileRun, ...]
    packed: tuple[PackedSlot, ...]

    def ends(self) -> dict[Path, int]:
        """How many bytes each file has to have."""
        out: dict[Path, int] = {}
        for file, end in [(r.file, r.end) for r in self.runs] + [
            (p.file, p.at + p.nbytes) for slot in self.packed for p in slot.tensor.pieces
        ]:
            out[file] = max(end, out.get(file, 0))
        return out

    @classmethod
    def plan(cls, tensors: Sequence[tuple[str, StoredTensor]], parts: int) -> StoredLayout:
        """Lay a unit's tensors out.

        Args:
            tensors: by name, in the order of the parameters.
            parts: equal shards that the buffer is cut into.
        """
        offsets: dict[int, int] = {}
        runs: list[FileRun] = []
        place = {i: t.pieces[0] for i, (_, t) in enumerate(tensors) if len(t.pieces) == 1 and t.nbytes}
        straight = sorted(place, key=lambda i: (str(place[i].file), place[i].at))
        at, group = 0, list[int]()

        def close() -> None:
            nonlocal at
            if not group:
                return
            found = [place[i] for i in group]
            start = found[0].at // ALIGN * ALIGN
            end = max(p.at + p.nbytes for p in found)
            nbytes = padded(end - start)
            runs.append(FileRun(found[0].file, start, nbytes, at, end))
            for i, p in zip(group, found, strict=True):
                offsets[i] = at + p.at - start
            at += nbytes
            group.clear()

        for i in straight:
            here, last = place[i], place[group[-1]] if group else None
            if last is not None and (here.file != last.file or here.at > last.at + last.nbytes + GAP):
                close()
            group.append(i)
        close()
        packed: list[PackedSlot] = []
        for i, (_, t) in enumerate(tensors):
            if i not in offsets:
                offsets[i] = at
                packed.append(PackedSlot(t, at))
                at += -(-t.nbytes // _SLOT) * _SLOT
        shard = max(padded(-(-at // parts)), ALIGN)
        slots = tuple(Slot(name, (t.nbytes,), offsets[i]) for i, (name, t) in enumerate(tensors))
        return cls(Layout(slots, parts, shard), tuple(runs), tuple(slot for slot in packed if slot.tensor.nbytes))


class Reading(NamedTuple):
    """What all stored buckets of a model share.

    Args:
        device: where values are to be when they are used.
        home: buffers for what goes to a device with memory of its own, and its link.
        files: reads them.
        pages: memory for values that come and go on the CPU.
    """

    device: torch.device
    home: Home
    files: StoredFiles
    pages: PagePool


class StoredBucket(Bucket):
    """A unit's parameters as bytes of files. See :class:`~shardwise.engine.flat.FlatParameters` for what is not here.

    Args:
        params: placeholders on the device: what they hold is never looked at.
        tensors: where the values of each are.
        strategy: ``offload_params=device``: values stay where they are used; ``cpu``: in host memory. Reading them has
            begun then, and :meth:`arrive` ends it. ``nvme``: they are read from the files each time.
        reading: see :class:`Reading`.

    Raises:
        OffloadError: a file cannot be read.
    """

    read_only = True

    def __init__(
        self,
        label: str,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        tensors: Sequence[StoredTensor],
        mesh: Mesh,
        strategy: Strategy,
        ledger: Ledger,
        reading: Reading,
    ) -> None:
        self.label, self.params, self.names, self.mesh, self.ledger = label, list(params), list(names), mesh, ledger
        self.strategy, self.reading, self.device, self.home = strategy, reading, reading.device, reading.home
        self.master_dtype = self.dtype = self.reduce_dtype = torch.uint8
        self.reconcile = self.finish_transfers = self.finish_update = _nothing
        self.tensors = list(tensors)
        plan = StoredLayout.plan(list(zip(names, tensors, strict=True)), mesh.parts)
        self.granularity, self.whole_tensors, self.compute_dtype, self.overlap = "element", False, None, False
        self.wire_bytes, self.share = 0, 1.0 / mesh.parts
        self._set_layout(plan.layout)
        # Size, strides and offset of each parameter in the flat buffer seen in its dtype.
        self._strides = [
            (t.dtype, (t.shape, row_strides(t.shape), slot.offset // t.dtype.itemsize))
            for t, slot in zip(tensors, plan.layout.slots, strict=True)
        ]
        self.offsets = [(i, slot.offset) for i, slot in enumerate(self.layout.slots) if slot.numel]
        self.placement = place(
            strategy, Ranks(mesh.parts, mesh.shard.size), "uint8", trainable=False, floating=False,
            separate=reading.home.separate,
        )  # fmt: skip
        self.place, self._copy_tag = mesh.new_tag(), None
        self._name_messages()
        self.pieces, self.piece_params, self.piece_starts = [[] for _ in params], [[] for _ in params], []
        self.shard = self.values = self._arriving = None
        self._loading: list[Transfer] = []
        self._take_stored(plan)
        self.grads = self._gradients()

    # --- making it ---------------------------------------------------------------------------------
    @torch.no_grad()
    def _take_stored(self, stored_layout: StoredLayout) -> None:
        for file, end in stored_layout.ends().items():
            self.reading.files.require(file, end)
        plan, numel = self.placement, self.held.stop - self.held.start
        state = "gather_buffers" if plan.released else "parameters"
        self.flat = self._buffer(self.layout.numel, state)
        stored = StoredValues(
            self.reading.home, numel, list(self._parts(stored_layout, self.held.start, self.held.stop))
        )
        self.source = None
        if plan.params_on_disk:
            self.master = torch.empty(0, dtype=torch.uint8)
            self.source = stored
        else:
            if plan.aliased:
                self.flat.fill()
                self.master = self.flat.tensor[self.held]
            elif plan.params_offloaded:
                self.master = self.empty(numel, torch.uint8, on_host=True)
            else:
                self.kept = self._buffer(numel, "parameters")
                self.kept.fill()
                self.master = self.kept.tensor
            self._loading = stored.fill(self.master)
            if plan.params_offloaded:
                self.source = OffloadedValues(
                    self.reading.home, f"unit {self.label} parameters", self.master, disk=False, state="parameters"
                )
        # Views of the values while they are elsewhere: shape and dtype, and no memory.
        self._hollow = self.flat.hollow(self._cut) if isinstance(self.flat, PageBuffer) else []
        for p in self.params:
            p.requires_grad_(False)
            bring_meaning(p, self.device)
        self._attach_all()
        if not plan.params_on_disk and self.master.numel() == self.layout.numel:  # all of it is here: nobody else's
            of = weakref.ref(self)  # values that it was made of are needed no longer, nor their files
            for i, t in enumerate(self.tensors):
                self.tensors[i] = StoredTensor(t.dtype, t.shape, (), partial(_read_back, of, i))

    def arrive(self) -> int:
        """Have the values that stay.

        Returns:
            How many bytes of weights have come since the bucket was made, on this rank.

        Raises:
            OffloadError: a file cannot be read. Others may be on their way still.
        """
        coming, self._loading = self._loading, []
        TransferGroup(coming).wait()
        return self.held_bytes if coming else 0

    @property
    def arriving(self) -> bool:
        """Is :meth:`arrive` to be called?"""
        return bool(self._loading)

    @property
    def held_bytes(self) -> int:
        """Bytes of weights that this rank holds, or reads."""
        return -(-sum(t.nbytes for t in self.tensors) // self.mesh.parts)

    def _cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The parameters in the flat buffer."""
        typed = {dtype: flat.view(dtype) for dtype in {t.dtype for t in self.tensors}}
        return [typed[dtype].as_strided(*place) for dtype, place in self._strides]

    def _buffer(self, nbytes: int, state: str) -> Buffer:
        if self.device.type == "cpu":
            return PageBuffer(nbytes, state, self.ledger, self.reading.pages)
        return Buffer(nbytes, torch.uint8, self.device, state, self.ledger)

    def _parts(self, plan: StoredLayout, lo: int, hi: int) -> Iterator[Part]:
        """What of which file belongs into the flat buffer's bytes ``lo:hi``."""
        files = self.reading.files
        for run in plan.runs:
            start, stop = run.overlap(lo, hi)
            if start < stop:
                read = partial(files.read, run.file, run.start + start - run.offset)
                yield Part(start - lo, stop - lo, read)
        for slot in plan.packed:
            for piece in slot.tensor.pieces:
                begin = slot.offset + piece.start
                start, stop = max(lo, begin), min(hi, begin + piece.nbytes)
                if start < stop:
                    yield Part(start - lo, stop - lo, partial(files.read, piece.file, piece.at + start - begin))
            if slot.tensor.pieces:
                continue
            first, last = slot.elements(lo, hi)
            if first < last:
                width = slot.tensor.dtype.itemsize
                at = slot.offset + first * width - lo
                yield Part(at, at + (last - first) * width, partial(_convert, files, slot.tensor, first, last))

    def _attach_all(self) -> None:
        """Let the parameters be views of where the values are now."""
        views = self._hollow if self._moves and not self.flat.filled else self._cut(self.flat.tensor)
        with torch._C.DisableTorchFunctionSubclass():
            for p, view in zip(self.params, views, strict=True):
                p.data = view
        self.flat.owners = len(self.params)
        self.note()

    def copied(self, params: Sequence[nn.Parameter], ledger: Ledger, *_: Any, **__: Any) -> StoredBucket:
        """Once more, for other parameters: what stays in memory is copied, or read again where ranks split it."""
        new = StoredBucket(
            self.label, params, self.names, self.tensors, self.mesh, self.strategy, ledger, self.reading
        )  # fmt: skip
        new._copy_tag = self.mesh.new_copy_tag()
        new._name_messages(" (a copy)")
        new.arrive()
        return new

    # --- gather and release --------------------------------------------------------------------------
    def fill(self) -> None:
        if not self.flat.filled:
            self.flat.fill()
            if self._moves:
                self._attach_all()

    def release(self) -> bool:
        released = super().release()
        if self._moves:
            self._attach_all()
        return released

    @property
    def _moves(self) -> bool:
        """Are values at another address each time?"""
        return isinstance(self.flat, PageBuffer)

    @property
    def sends_own(self) -> bool:
        return self.source is None and not self.placement.aliased

    # --- master values ---------------------------------------------------------------------------------
    @contextmanager
    def master_here(self, *, write: bool = False) -> Iterator[torch.Tensor]:
        """The held bytes, on the CPU or the device. They cannot be written to."""
        if write:
            self.require_writable()
        if self.placement.params_on_disk:
            assert self.source is not None
            yield self.source.copied()
        else:
            yield self.master

    def take_values(self) -> None:
        self.require_writable()

    def moved(self) -> list[int]:
        return []  # they are moved here, and nowhere else

    def require_writable(self) -> None:
        raise UnitError(
            "its weights are read from files each time they are needed, so that what is written to them is lost",
            where=f"unit {self.label}",
            fix="keep them in memory (device_map='cpu' or a device), or train with shardwise.fully_shard",
        )


def _read_back(of: weakref.ref[StoredBucket], index: int, start: int, stop: int, out: torch.Tensor) -> None:
    """Elements of a parameter whose bucket has all values, for a copy of it."""
    bucket = of()
    assert bucket is not None, "it is being copied"
    slot = bucket.layout.slots[index]
    out.copy_(bucket.master[slot.offset : slot.stop].view(out.dtype)[start:stop])


def _nothing() -> None:
    return


def _convert(files: StoredFiles, tensor: StoredTensor, start: int, stop: int, into: torch.Tensor) -> Task:
    """Begin to fill ``into``, ``uint8``, with elements ``start:stop``."""
    out = into.view(tensor.dtype)
    if tensor.other is None:
        return files.beside(partial(tensor.convert, start, stop, out))
    piece, dtype = tensor.other
    return files.beside(partial(files.convert, piece.file, piece.at + start * dtype.itemsize, dtype, out))
