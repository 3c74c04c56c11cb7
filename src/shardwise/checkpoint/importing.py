"""Weights that anybody saved, straight into the shards of a model."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpoint.background import settle_saves
from shardwise.checkpoint.checking import whole
from shardwise.checkpoint.files import BLOCK, MANIFEST
from shardwise.checkpoint.models import ModelState, model_states
from shardwise.checkpoint.naming import Fit, fit
from shardwise.checkpoint.partly import loading, recovery
from shardwise.checkpoint.progress import Progress
from shardwise.checkpoint.ranks import Together, from_first, share
from shardwise.checkpoint.reading import Reader
from shardwise.checkpoint.sources import open_source
from shardwise.checkpoint.stored import KINDS, Source, Stored
from shardwise.comm import World
from shardwise.engine.state_dict import held, publish, units_of
from shardwise.errors import CheckpointError

_SHOWN = 10  # differences that an error lists


@dataclass(frozen=True)
class LoadedModel:
    """What :func:`load_model` did.

    Args:
        path, kind: what was read; ``kind`` is ``shardwise``, ``dcp``, ``safetensors``, ``torch`` or ``deepspeed``.
        missing_keys: of the model, not in the files; they keep their values.
        unexpected_keys: in the files, not in the model.
        mismatched_keys: with another shape or another kind of numbers; they keep their values.
        bytes_read: tensor bytes that this rank read.
    """

    path: Path
    kind: str
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)
    bytes_read: int = 0


@torch.no_grad()
def load_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    part: str | None = None,
    progress: bool = True,
) -> LoadedModel:
    """Load a model's weights in place, from whatever holds them. Collective.

    Reads a Hugging Face folder or a ``.safetensors`` file, ``.pt``, ``.pth`` and ``.bin`` files of ``torch.save``,
    folders of ``torch.distributed.checkpoint`` (FSDP1, FSDP2), DeepSpeed's ZeRO folders (fp32 weights where there are
    any), and Shardwise's own checkpoints. Nothing in them is run or unpickled. Wrappers' names, one prefix more or
    less (``model.``, ``module.``, a base model's), and tied names are understood; values take the model's dtypes.

    Args:
        model: sharded or not; wrappers are looked through. Optimizer state is not touched.
        path: a folder or file that all ranks see.
        strict: raise if names or shapes differ. Otherwise load what fits; the result lists the rest.
        part: which dict holds the weights, where there are several: ``model``, ``ema``, keys joined with dots.
        progress: show a bar on rank 0, if it has a terminal and this takes longer than a second.

    Raises:
        CheckpointError: on every rank, before anything has changed: nothing there, damaged, not tensors, or it does
            not fit. Also if a file cannot be read halfway; the model then refuses to run until it is loaded whole.

    Cost: each rank reads the bytes of what it holds. Host memory beyond the model's: one block of 8 MiB, and one
    unit's shards where values live on a disk. Files of torch before 1.6, and tensors that were saved transposed, are
    read whole. Checksums of Shardwise's own checkpoints are read first.
    """
    settle_saves()
    with recovery([model]) as recovered:
        loaded = _load_model(model, path, strict, part, progress)
        recovered.complete = not loaded.missing_keys and not loaded.mismatched_keys
    return loaded


def _load_model(
    model: nn.Module, path: str | os.PathLike[str], strict: bool, part: str | None, progress: bool
) -> LoadedModel:
    given = Path(os.path.realpath(path))
    doing = f"loading the model from {given}"
    with Together(doing):
        (state,) = model_states([model])
        _check(state)
        own = not given.exists() or (given / MANIFEST).is_file()
    if from_first(str(own)) == "True":
        given, _ = whole(given, progress)
    with Together(doing, slow=True):
        source = open_source(given)
        found = fit(state, source, part)
        index = zlib.crc32(repr([(name, t.dtype, t.shape) for name, t in found.tensors.items()]).encode())
        odd = [name for name, stored in found.twice.items() if not _equal(stored)]
    told = [json.loads(data) for data in share(json.dumps([index, odd]).encode())]
    with Together(doing):
        if told[0][0] != index:
            raise CheckpointError(
                "rank 0 sees other files under this path than this rank",
                where=str(given),
                fix="put them on a file system that all hosts share, or copy the same files to every host",
            )
        for name in sorted({name for _, names in told for name in names}):
            found.leave_out(name, f"the names of '{name}' are tied in the model, and there they are different tensors")
        if found.lines and strict:
            raise CheckpointError(_says(found.lines, source), where=str(given), fix=_advice(found))
    total = sum((hi - lo) * stored.dtype.itemsize for stored, lo, hi in _wanted(state, found))
    with Progress("loading", total, progress) as bar, Reader(bar.add) as reader:
        with Together(doing, slow=True):
            for stored, lo, hi in _wanted(state, found):
                reader.prepare(stored, lo, hi)
        for unit in units_of(state.module):
            unit.settle()
        with loading([state.module], given):
            with Together(doing, slow=True):
                _load(state, found, reader)
            publish(state.module)
    return LoadedModel(given, source.kind, found.missing, found.unexpected, found.mismatched, reader.nbytes)


def _says(lines: Sequence[str], source: Source) -> str:
    shown = "\n    ".join(lines[:_SHOWN])
    more = f"\n    and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return f"{KINDS[source.kind]} that does not fit the model:\n    {shown}{more}"


def _advice(found: Fit) -> str:
    return f"strict=False loads the {len(found.tensors)} tensors that fit and lists the rest"


def _check(state: ModelState) -> None:
    for name, p in state.parameters.items():
        if isinstance(p, DTensor):
            raise CheckpointError(
                "is a DTensor", where=f"parameter '{name}'", fix="load it with torch.distributed.checkpoint"
            )


def _equal(stored: Sequence[Stored]) -> bool:
    """Whether tensors have the same values. Each rank compares its part."""
    first, world = stored[0], World.current()
    if any(t.shape != first.shape for t in stored):
        return False
    start, stop = first.numel * world.rank // world.size, first.numel * (world.rank + 1) // world.size
    each = BLOCK // 16
    with Reader() as reader:
        for lo in range(start, stop, each):
            blocks = [reader.values(t, lo, min(stop, lo + each)) for t in stored]
            if any(not torch.equal(blocks[0], block) for block in blocks[1:]):
                return False
    return True


def _wanted(state: ModelState, found: Fit) -> Iterator[tuple[Stored, int, int]]:
    """What this rank reads of which tensor."""
    for name, stored in found.tensors.items():
        p = state.parameters.get(name)
        mine = None if p is None else held(p)
        if mine is None:
            yield stored, 0, stored.numel
        else:
            yield from ((stored, lo, hi) for lo, hi, _ in mine.pieces)


def _load(state: ModelState, found: Fit, reader: Reader) -> None:
    names = {id(p): name for name, p in state.parameters.items()}
    for unit in units_of(state.module):
        for bucket in unit.buckets:
            mine = {i: found.tensors.get(names.get(id(p), "")) for i, p in enumerate(bucket.params)}
            if not any(mine.values()):
                continue
            with bucket.master_here(write=True):
                for i, stored in mine.items():
                    for (lo, hi), piece in zip(bucket.ranges(i), bucket.piece_params[i], strict=True):
                        if stored is not None:
                            reader.read(stored, lo, hi, piece)
    for name, tensor in {**state.parameters, **state.buffers}.items():
        stored = found.tensors.get(name)
        if stored is None or (isinstance(tensor, nn.Parameter) and held(tensor) is not None):
            continue
        if tensor.is_contiguous():
            reader.read(stored, 0, stored.numel, tensor.detach())
        else:
            tensor.copy_(reader.values(stored).view(stored.shape))
