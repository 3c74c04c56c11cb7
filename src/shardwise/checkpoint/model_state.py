"""What a model has to save, under which names, and how it is put back.

A rank's slices of a parameter are shown to ``torch.distributed.checkpoint`` as the row-major boxes that it stores.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from shardwise.engine.bucket import Bucket
from shardwise.engine.hooks import engine_of
from shardwise.engine.state_dict import Held, held, units_of
from shardwise.errors import CheckpointError
from shardwise.naming import WRAPPERS, clean_name
from shardwise.tiers.swapped_tensor import fetch, is_swapped

Box = tuple[tuple[int, ...], tuple[int, ...], int, int]
"""Offsets, sizes, and the range ``start:stop`` of the flattened tensor that the box covers."""


@lru_cache(maxsize=4096)  # a parameter and its optimizer state are cut alike, at every save
def _boxes(shape: tuple[int, ...], start: int, stop: int) -> tuple[Box, ...]:
    return tuple(boxes(shape, start, stop))


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The fewest boxes, in order, whose elements are ``start:stop`` of a row-major tensor of ``shape``.

    Each box is contiguous in the flattened tensor. There are at most ``2 * len(shape) - 1`` of them.
    """
    out: list[Box] = []

    def cut(prefix: tuple[int, ...], shape: tuple[int, ...], lo: int, hi: int, base: int) -> None:
        if lo >= hi:
            return
        ones = (1,) * len(prefix)
        if len(shape) <= 1:
            inner = ((lo,), (hi - lo,)) if shape else ((), ())
            out.append((prefix + inner[0], ones + inner[1], base + lo, base + hi))
            return
        row = prod(shape[1:])
        first, last = -(-lo // row), hi // row  # the whole rows in between
        if first > last:  # all of it lies inside one row
            at = lo // row
            cut((*prefix, at), shape[1:], lo - at * row, hi - at * row, base + at * row)
            return
        if lo < first * row:
            cut((*prefix, first - 1), shape[1:], lo - (first - 1) * row, row, base + (first - 1) * row)
        if first < last:
            offsets = (*prefix, first, *(0,) * (len(shape) - 1))
            out.append((offsets, (*ones, last - first, *shape[1:]), base + first * row, base + last * row))
        if last * row < hi:
            cut((*prefix, last), shape[1:], 0, hi - last * row, base + last * row)

    cut((), tuple(shape), start, stop, 0)
    return out


class Slices(torch.Tensor):
    """Stands for a tensor of ``shape`` of which this rank has some contiguous slices, or none.

    Args:
        shape: of the whole tensor.
        dtype, device: of the slices.
        pieces: ``(start, stop, slice)``; the slice is contiguous and holds ``start:stop`` of the flattened
            tensor. Reading writes into it, so nothing is copied. One whose bytes are on a disk is fetched when its turn
            comes to be saved; to be read into, it must be here by then.
    """

    parts: list[tuple[Box, int, torch.Tensor]]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        pieces: Sequence[tuple[int, int, torch.Tensor]],
    ) -> Slices:
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        pieces: Sequence[tuple[int, int, torch.Tensor]],
    ) -> None:
        self.pieces = list(pieces)
        self.parts = []
        for start, stop, piece in pieces:
            source = piece if is_swapped(piece) else piece.detach().view(-1)  # the memory it has now
            self.parts += [(box, start, source) for box in _boxes(tuple(shape), start, stop)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            whole = args[0]
            return Slices(whole.shape, whole.dtype, whole.device, whole.pieces)
        raise NotImplementedError(f"{func} on slices of a tensor")

    @property
    def in_memory(self) -> bool:
        """Are all bytes in memory?"""
        return not any(is_swapped(piece) for _, _, piece in self.pieces)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Slices({tuple(self.shape)}, {[(a, b) for a, b, _ in self.pieces]})"

    # --- what torch.distributed.checkpoint asks of a tensor that is spread over ranks ---------
    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box[0]), torch.Size(box[1])) for box, _, _ in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for box, start, source in self.parts:
            if box[0] == tuple(index.offset or ()):
                return fetch(source).detach().view(-1)[box[2] - start : box[3] - start].view(box[1])
        raise KeyError(index)


# --- names and tensors of a model ----------------------------------------------------------------
def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside compiled models and data-parallel wrappers, whose names the checkpoint has."""
    while True:
        children = vars(model).get("_modules", {})
        wrapped = next((child for name in WRAPPERS if isinstance(child := children.get(name), nn.Module)), None)
        if wrapped is not None:
            model = wrapped
            continue
        inner = children.get("module")
        engine = engine_of(model)
        wraps = isinstance(model, nn.parallel.DistributedDataParallel) or (
            engine is not None and engine.module is not model and engine.module is inner
        )
        if not wraps:
            return model
        model = inner


@dataclass(frozen=True)
class Entry:
    """One key of a module's state dict: ``kind`` is ``parameter``, ``buffer`` or ``extra``."""

    name: str
    kind: str
    owner: nn.Module
    value: Any


def entries(module: nn.Module) -> Iterator[Entry]:
    """What ``module.state_dict()`` holds, in its order and under clean names, without bringing any values here."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        prefix = clean_name(prefix)
        dot = f"{prefix}." if prefix else ""
        for name, p in owner._parameters.items():
            if p is not None:
                yield Entry(dot + name, "parameter", owner, p)
        for name, b in owner._buffers.items():
            if b is not None and name not in owner._non_persistent_buffers_set:
                yield Entry(dot + name, "buffer", owner, b)
        if type(owner).get_extra_state is not nn.Module.get_extra_state:
            yield Entry(f"{dot}_extra_state", "extra", owner, None)


@dataclass
class ModelState:
    """What one model saves or loads.

    Args:
        label: ``model``, ``model_1``, ...: the first part of its keys.
        module: without wrappers.
        parameters: by name; tied ones under their first name only.
        aliases: the other names of tied parameters and buffers, and the first one of each.
        buffers: persistent ones by name.
        extra: owners of extra state by name.
        excluded: only names count: somebody else saves and loads its values.
        left_out: parameters that are not saved: a load leaves them as they are.
    """

    label: str
    module: nn.Module
    excluded: bool = False
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict[str, nn.Module] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def leave_out_frozen(self) -> None:
        """Save the parameters that train, and no others."""
        self.left_out = {name for name, p in self.parameters.items() if not p.requires_grad}

    def tensors(self, everything: bool) -> dict[str, torch.Tensor]:
        """What this rank holds, by name, aliasing the model.

        Args:
            everything: also what is equal on all ranks because nothing shards it. To save, rank 0 is enough.
        """
        out: dict[str, torch.Tensor] = {}
        if self.excluded:
            return out
        for name, p in self.parameters.items():
            if name in self.left_out:
                continue
            mine = held(p)
            if mine is not None and p.numel():
                out[name] = Slices(mine.shape, mine.dtype, mine.device, mine.pieces)
            elif everything or isinstance(p, DTensor):
                out[name] = torch.empty(mine.shape, dtype=mine.dtype) if mine is not None else p.detach()
        if everything:
            out.update({name: b.detach() for name, b in self.buffers.items()})
        return out

    @property
    def strategy(self) -> str:
        units = units_of(self.module)
        return str(units[0].strategy) if units else "none"

    def buffers_crc(self) -> int:
        """Of this rank's buffers, to see whether they differ between ranks."""
        crc = 0
        for b in self.buffers.values():
            crc = zlib.crc32(_bytes(b), crc)
        return crc


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def model_states(
    models: Sequence[nn.Module], excluded: Collection[nn.Module] = (), *, placeholders: bool = False
) -> list[ModelState]:
    """Name everything in ``models``.

    Args:
        excluded: those whose values are not ours. Their parameters have names, for the optimizers that hold them.
        placeholders: tensors on the meta device are as good as others.

    Raises:
        CheckpointError: a parameter on the meta device; one model twice.
    """
    out: list[ModelState] = []
    for i, model in enumerate(models):
        out_of_it = any(model is other for other in excluded)
        state = ModelState("model" if i == 0 else f"model_{i}", unwrapped(model), out_of_it)
        if any(state.module is other.module for other in out):
            raise CheckpointError(f"{type(state.module).__name__} was given twice", where=state.label)
        first: dict[int, str] = {}
        names: set[str] = set()
        for entry in entries(state.module):
            if entry.kind == "extra":
                if not out_of_it:
                    state.extra[entry.name] = entry.owner
                continue
            if out_of_it and entry.kind == "buffer":
                continue
            if entry.value.is_meta and not (out_of_it or placeholders):
                raise CheckpointError(
                    "is on the meta device and has no values",
                    where=f"{entry.kind} '{entry.name}' of {state.label}",
                    fix="materialise the model first",
                )
            known = first.get(id(entry.value))
            if known != entry.name and entry.name in names:
                raise CheckpointError(
                    "two tensors have this name when the names of wrappers are left out",
                    where=f"{entry.kind} '{entry.name}' of {state.label}",
                    fix="give one of the modules another name",
                )
            names.add(entry.name)
            if known is not None:
                if known != entry.name:
                    state.aliases[entry.name] = known
                continue
            first[id(entry.value)] = entry.name
            (state.parameters if entry.kind == "parameter" else state.buffers)[entry.name] = entry.value
        out.append(state)
    return out


def parameter_labels(states: Sequence[ModelState]) -> dict[int, tuple[str, str]]:
    """By ``id`` of a parameter: what optimizers call it in the checkpoint, and its own key."""
    out: dict[int, tuple[str, str]] = {}
    for i, state in enumerate(states):
        for name, p in state.parameters.items():
            out.setdefault(id(p), (name if i == 0 else f"{state.label}:{name}", f"{state.label}.{name}"))
    return out


# --- what a load fills at a time -----------------------------------------------------------------
@dataclass
class LoadBatch:
    """Tensors that are in memory at the same time.

    Args:
        bucket: whose they are, if it has values or optimizer state on a disk; ``None``: all others.
        tensors: by their names in the checkpoint.
        after: what to call when they have their values.
    """

    bucket: Bucket | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    after: list[Callable[[], object]] = field(default_factory=list)

    def in_memory(self) -> AbstractContextManager[object]:
        """Have its values in memory inside the block. They go home after it."""
        return nullcontext() if self.bucket is None else self.bucket.master_here(write=True)

    def filled(self) -> None:
        """The tensors have their values: do what is to be done then, and hold what it needed no longer."""
        for call in self.after:
            call()
        self.after.clear()


class LoadBatches:
    """All that a load fills.

    Attributes:
        rest: for what has no batch of its own, and for what belongs to no parameter; comes last.
    """

    def __init__(self) -> None:
        self._of: dict[int, LoadBatch] = {}
        self.rest = LoadBatch()

    def of(self, mine: Held | None) -> LoadBatch:
        """Where what belongs to a parameter is to be put."""
        if mine is None or mine.bucket.home is None or mine.bucket.home.disk is None:
            return self.rest
        return self._of.setdefault(id(mine.bucket), LoadBatch(mine.bucket))

    def __iter__(self) -> Iterator[LoadBatch]:
        yield from self._of.values()
        yield self.rest

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for batch in self for name, tensor in batch.tensors.items()}
