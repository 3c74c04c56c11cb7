"""Whole models: one state dict, or the files that transformers and safetensors read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpoint.models import ModelState, entries, model_states
from shardwise.checkpoint.partly import refuse
from shardwise.checkpoint.progress import Progress
from shardwise.checkpoint.ranks import Together, from_first
from shardwise.checkpoint.writers import DTYPES, BinWriter, SafeWriter, Writer, bytes_of, shards_of
from shardwise.comm import World
from shardwise.engine.state_dict import held, units_of
from shardwise.errors import CheckpointError


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
    refuse(state.module)
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
    root = Path(from_first(os.path.realpath(directory)))
    (state,) = model_states([model])
    refuse(state.module)
    first = World.current().rank == 0
    doing = f"writing the model to {root}"
    writer: Writer | None = None
    with Together(doing):
        tensors = _tensors(state)
        shards = shards_of(tensors, bytes_of(max_shard_size))
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
        with Together(doing):
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
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"has dtype {tensor.dtype}, which safetensors lacks", where=f"'{name}'", fix="safe_serialization=False"
            )
    if state.extra:
        raise CheckpointError(
            f"the module '{next(iter(state.extra))}' is extra state, which safetensors has no place for",
            fix="safe_serialization=False",
        )
