"""Whole models: one state dict, or the files that transformers and safetensors read, filled tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpoint.coordination import CollectiveBlock, Progress, broadcast_text
from shardwise.checkpoint.directory import sync_directory
from shardwise.checkpoint.incomplete_load import refuse_incomplete
from shardwise.checkpoint.model_state import ModelState, entries, model_states
from shardwise.checkpoint.stored_tensor import SAFETENSORS_DTYPES
from shardwise.comm import World
from shardwise.engine.state_dict import held, units_of
from shardwise.errors import CheckpointError
from shardwise.sizes import parse_bytes

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Shard:
    """The tensors of one file: name, dtype and shape of each."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    size: int = 0


def shards_of(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[Shard]:
    """Which file each tensor goes into: in their order, so that files fill one by one, ``limit`` bytes at most each.

    One tensor is never cut, however large.
    """
    shards = [Shard()]
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1].tensors and shards[-1].size + size > limit:
            shards.append(Shard())
        shards[-1].tensors[name] = (dtype, shape)
        shards[-1].size += size
    return shards


def shard_limit(text: int | str) -> int:
    """``max_shard_size`` in bytes.

    Raises:
        CheckpointError: it is not a size.
    """
    limit = parse_bytes(text)
    if not limit:
        raise CheckpointError(f"max_shard_size={text!r} is not a size", fix="write it like '500MB' or '10GB'")
    return limit


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Around what makes a folder and writes to it.

    Raises:
        CheckpointError: it cannot be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot be written: {error.strerror or error}", where=str(error.filename or root),
            fix="check that the folder can be written and that the disk is not full",
        ) from error  # fmt: skip


class Writer:
    """One process's side: takes tensors one by one, and puts the finished files in place of older ones.

    As a context manager it does that when the block ends, and leaves nothing behind if it ends in an exception.

    Args:
        root: an existing folder.
        shards: what goes into which file.
        aliases: the other names of tied tensors, and the name of each in ``shards``.
        extra: owners of extra state by name; for ``BinWriter``.
    """

    stem, ending = "", ""

    def __init__(
        self,
        root: Path,
        shards: list[Shard],
        aliases: Mapping[str, str],
        extra: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.root, self.shards, self.all_aliases, self.extra = root, shards, aliases, dict(extra or {})
        self.mark = uuid.uuid4().hex[:8]
        count = len(shards)
        self.names = [
            f"{self.stem}{self.ending}" if count == 1 else f"{self.stem}-{i + 1:05d}-of-{count:05d}{self.ending}"
            for i in range(count)
        ]
        self.shard_of = {name: i for i, shard in enumerate(shards) for name in shard.tensors}
        self.prepare()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.clean()

    def prepare(self) -> None:
        """What a kind of files needs to know before the first tensor."""
        raise NotImplementedError

    def temporary(self, name: str) -> Path:
        return self.root / f".{name}.tmp-{self.mark}"

    def write(self, name: str, fill: Callable[[BinaryIO], None]) -> None:
        with self.temporary(name).open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())

    def aliases(self, shard: Shard) -> dict[str, str]:
        return {alias: name for alias, name in self.all_aliases.items() if name in shard.tensors}

    def add(self, name: str, value: torch.Tensor, start: int = 0) -> None:
        raise NotImplementedError

    def weight_map(self) -> dict[str, str]:
        return {name: self.names[i] for name, i in sorted(self.shard_of.items())}

    def finish(self) -> None:
        names = list(self.names)
        if len(names) > 1:
            total = sum(shard.size for shard in self.shards)
            index = {"metadata": {"total_size": total}, "weight_map": self.weight_map()}
            names.append(f"{self.stem}{self.ending}.index.json")
            self.write(names[-1], lambda file: _write_all(file, json.dumps(index, indent=2).encode() + b"\n"))
        for name in names:
            self.temporary(name).replace(self.root / name)
        pattern = rf"{self.stem}(-\d{{5}}-of-\d{{5}})?{re.escape(self.ending)}(\.index\.json)?"
        for path in self.root.iterdir():
            if re.fullmatch(pattern, path.name) and path.name not in names:
                path.unlink()
        sync_directory(self.root)

    def clean(self) -> None:
        """Leave no half-written file behind."""
        for path in self.root.glob(f".*.tmp-{self.mark}"):
            path.unlink()


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


class SafeWriter(Writer):
    """Writes each tensor to its place as it comes: the header is known beforehand."""

    stem, ending = "model", ".safetensors"

    def prepare(self) -> None:
        self.left = [shard.size for shard in self.shards]  # bytes
        self.places: dict[str, int] = {}
        self.files: dict[int, BinaryIO] = {}

    def _open(self, i: int) -> BinaryIO:
        shard = self.shards[i]
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **self.aliases(shard)}}
        at = 0
        # Wide elements first, as the safetensors library does, so that every tensor is aligned.
        for name, (dtype, shape) in sorted(shard.tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            stop = at + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
            self.places[name], at = at, stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = self.files[i] = self.temporary(self.names[i]).open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shard.tensors:
            self.places[name] += 8 + len(text)
        return file

    def add(self, name: str, value: torch.Tensor, start: int = 0) -> None:
        """Write a tensor, or elements of the flattened tensor from ``start`` on. Each element once."""
        i = self.shard_of[name]
        if not value.numel():
            return
        file = self.files.get(i) or self._open(i)
        file.seek(self.places[name] + start * value.element_size())
        file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.left[i] -= value.nbytes
        if not self.left[i]:
            file.flush()
            os.fsync(file.fileno())
            self.files.pop(i).close()

    def finish(self) -> None:
        for i, shard in enumerate(self.shards):
            if not shard.size:  # nothing, or empty tensors
                self._open(i)
        self._close()
        super().finish()

    def _close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def clean(self) -> None:
        self._close()
        super().clean()


class BinWriter(Writer):
    """Keeps the tensors of a file until it is complete."""

    stem, ending = "pytorch_model", ".bin"

    def prepare(self) -> None:
        self.left = [len(shard.tensors) for shard in self.shards]
        self.kept: dict[int, dict[str, Any]] = {i: {} for i in range(len(self.shards))}

    def add(self, name: str, value: torch.Tensor, start: int = 0) -> None:
        i = self.shard_of[name]
        self.kept[i][name] = value.to("cpu", copy=True)
        self.left[i] -= 1
        if not self.left[i] and i < len(self.shards) - 1:
            self._save(i)

    def _save(self, i: int) -> None:
        kept = self.kept.pop(i)
        aliases = {alias: kept[name] for alias, name in self.aliases(self.shards[i]).items()}
        extra: Mapping[str, Any] = {}
        if i == len(self.shards) - 1:
            extra = {name: owner.get_extra_state() for name, owner in self.extra.items()}
        self.write(self.names[i], lambda file: torch.save({**kept, **aliases, **extra}, file))

    def weight_map(self) -> dict[str, str]:
        tied = {alias: self.names[self.shard_of[name]] for alias, name in self.all_aliases.items()}
        return dict(sorted({**super().weight_map(), **tied}.items()))

    def finish(self) -> None:
        self._save(len(self.shards) - 1)
        super().finish()


# --- a model ------------------------------------------------------------------------------------
@torch.no_grad()
def full_state_dict(model: nn.Module, *, rank0_only: bool = False) -> dict[str, Any]:
    """The model's state dict with whole tensors on the CPU: copies of the master values. Collective.

    Args:
        model: sharded or not; wrappers are looked through.
        rank0_only: the other ranks get an empty dict.

    Cost: gathers the model unit by unit; the device never holds more than one unit beyond what it has. The
    result takes the whole model's memory on the ranks that get it.
    """
    (state,) = model_states([model])
    refuse_incomplete(state.module)
    wanted = not rank0_only or World.current().rank == 0
    values: dict[str, torch.Tensor] = {}
    for name, value in _stream(state):
        if wanted:
            values[name] = value.to("cpu", copy=True)
    out: dict[str, Any] = {}
    for entry in entries(state.module) if wanted else ():
        if entry.kind == "extra":
            out[entry.name] = entry.owner.get_extra_state()
        else:
            out[entry.name] = values[state.aliases.get(entry.name, entry.name)]
    return out


def _stream(state: ModelState) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer, whole, one unit after the other. Every rank must take all of it."""
    names = {id(p): name for name, p in state.parameters.items()}
    for unit in units_of(state.module):
        for bucket in unit.buckets:
            full = unit.full_values(bucket)
            for slot, p in zip(bucket.layout.slots, bucket.params, strict=True):
                if id(p) in names:
                    yield names[id(p)], full[slot.offset : slot.stop].view(slot.shape)
            del full
    for name, p in state.parameters.items():
        if held(p) is None:
            yield name, p.full_tensor() if isinstance(p, DTensor) else p.detach()
    for name, b in state.buffers.items():
        yield name, b.detach()


@torch.no_grad()
def save_model(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
    progress: bool = True,
) -> Path:
    """Write a model's weights as transformers does: ``model.safetensors``, or numbered files and an index.

    Collective; rank 0 writes. Parameters are the master values (fp32 in a bf16 run), tied ones once. Older
    files of this kind in the directory are replaced when the new ones are complete.

    Args:
        model: sharded or not; wrappers are looked through.
        directory: made if it is not there.
        max_shard_size: bytes per file at most (one tensor is never cut), or a text: ``500MB``, ``10GiB``.
        safe_serialization: if false, ``pytorch_model.bin`` files of ``torch.save`` instead.
        progress: show a bar on rank 0, if it has a terminal and this takes longer than a second.

    Returns:
        The directory.

    Raises:
        CheckpointError: on every rank: it cannot be written; a dtype or extra state that safetensors lacks.

    Cost: gathers the model unit by unit. No rank holds more than one unit beyond what it has; with
    ``safe_serialization=False`` rank 0 also holds the file it is writing.
    """
    root = Path(broadcast_text(os.path.realpath(directory)))
    (state,) = model_states([model])
    refuse_incomplete(state.module)
    first = World.current().rank == 0
    doing = f"writing the model to {root}"
    writer: Writer | None = None
    with CollectiveBlock(doing):
        tensors = _tensors(state)
        shards = shards_of(tensors, shard_limit(max_shard_size))
        _check_types(state, safe_serialization)
        if first:
            root.mkdir(parents=True, exist_ok=True)
            writer = (SafeWriter if safe_serialization else BinWriter)(root, shards, state.aliases, state.extra)
    failure: Exception | None = None
    total = sum(prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    try:
        with Progress("writing", total, progress) as bar:
            for name, value in _stream(state):
                if writer is not None and failure is None:
                    try:
                        writer.add(name, value)
                    except (OSError, RuntimeError) as error:  # the others are gathering: tell them when they are done
                        failure = error
                bar.add(value.nbytes)
        with CollectiveBlock(doing):
            if failure is not None:
                raise failure
            if writer is not None:
                writer.finish()
    finally:
        if writer is not None:
            writer.clean()
    return root


def _tensors(state: ModelState) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What is written, in the order in which it is gathered."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    names = {id(p): name for name, p in state.parameters.items()}
    for unit in units_of(state.module):
        for bucket in unit.buckets:
            for slot, p in zip(bucket.layout.slots, bucket.params, strict=True):
                if id(p) in names:
                    tensors[names[id(p)]] = (bucket.master_dtype, slot.shape)
    for name, tensor in {**state.parameters, **state.buffers}.items():
        tensors.setdefault(name, (tensor.dtype, tuple(tensor.shape)))
    return tensors


def _check_types(state: ModelState, safe: bool) -> None:
    if not safe:
        return
    for name, tensor in {**state.parameters, **state.buffers}.items():
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"has dtype {tensor.dtype}, which safetensors lacks", where=f"'{name}'", fix="safe_serialization=False"
            )
    if state.extra:
        raise CheckpointError(
            f"the module '{next(iter(state.extra))}' is extra state, which safetensors has no place for",
            fix="safe_serialization=False",
        )
