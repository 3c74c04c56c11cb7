"""From a model without values to one that runs: its files, where each of its weights is to be, and its buffers."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from shardwise.checkpoint.coordination import CollectiveBlock, Progress
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.model_loading import Fit, fit, misfit
from shardwise.checkpoint.model_state import ModelState, model_states
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Source, Stored
from shardwise.comm import init
from shardwise.engine.stored import FilePiece, StoredTensor
from shardwise.errors import CheckpointError, UnitError
from shardwise.inference.asked import Asked, as_budget, as_map
from shardwise.inference.conversions import converted
from shardwise.inference.dtypes import as_dtype
from shardwise.inference.micro_batches import check_pieces
from shardwise.inference.own_values import own_values
from shardwise.inference.plan import DEVICE, HOST
from shardwise.inference.planning import choose_plan, run_planned
from shardwise.inference.pretrained import model_of
from shardwise.inference.quantizing import quantize_as_read, quantize_like, refuse_disk, require_known, scales_in

_SHORT = 64 << 10  # bytes; many runs shorter than this are read in blocks, and taken apart
_MANY = 1024  # pieces; so many short ones are read in blocks, too


def load_from_files(
    model: str | os.PathLike[str] | nn.Module,
    asked: Asked,
    checkpoint: str | os.PathLike[str] | None,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: torch.dtype | str | None,
    no_split_module_classes: Sequence[str] | str | None,
    batch: int,
    length: int,
    ahead: int | None,
    micro_batches: int | None,
    verbose: bool,
    strict: bool,
    quantization: str | None,
) -> nn.Module:
    """:func:`shardwise.load`."""
    world = init()
    doing = f"loading {checkpoint or (type(model).__name__ if isinstance(model, nn.Module) else model)}"
    split = isinstance(asked, str) and asked == "split"

    def agreed() -> AbstractContextManager[object]:
        """Of a model that all ranks split, all have it or none: what is wrong on one of them is raised on all."""
        return CollectiveBlock(doing, slow=True) if split else nullcontext()

    with agreed():
        device_map, max_memory, wanted = as_map(asked), as_budget(max_memory), _dtype(dtype)
        require_known(quantization)
        module, folder = module_and_files(model, checkpoint, wanted)
        source = open_source(folder)
        quantize_like(module, source)
        (state,) = model_states([module], placeholders=True)
        found, reader = fitted(state, source, surplus=not strict), StorageReader()
        tensors = _tensors(state, found, reader, wanted)
        arriving = quantize_as_read(module, tensors, found.tensors, reader) if quantization else ()
    plan, device = choose_plan(
        module, tensors, device_map, world, agreed, max_memory=max_memory, classes=no_split_module_classes,
        batch=batch, length=length, ahead=ahead, verbose=verbose,
    )  # fmt: skip
    with agreed():
        check_pieces(micro_batches, plan)
        refuse_disk(module, plan.homes, arriving)
        _load_buffers(state, found, device)
    if verbose and world.rank == 0:
        print(plan, flush=True)
    module.eval()
    with Progress("loading", plan.total(DEVICE) + plan.total(HOST)) as bar, agreed():
        run_planned(module, tensors, plan, device, micro_batches, seen=bar.add)
    return module


def module_and_files(
    model: str | os.PathLike[str] | nn.Module, checkpoint: str | os.PathLike[str] | None, dtype: torch.dtype | None
) -> tuple[nn.Module, str | os.PathLike[str]]:
    """The module, and where its values are. Of a folder, a new one without values; ``dtype``: of its buffers.

    Raises:
        CheckpointError: neither a folder nor a module, a folder without a configuration, or a module alone.
    """
    if isinstance(model, (str, os.PathLike)):
        return model_of(model, dtype), model
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{model!r} is neither a folder nor a module", fix="Model(), made on the meta device, or a path"
        )
    if checkpoint is None:
        raise CheckpointError("a module without its weights", fix="give checkpoint=, the folder or file they are in")
    return model, checkpoint


def fitted(state: ModelState, source: Source, *, missing: bool = False, surplus: bool = True) -> Fit:
    """What of the files goes where.

    Args:
        missing, surplus: may the files lack something of the model, or have more than it?

    Raises:
        CheckpointError: it does not fit.
    """
    source.sections = {key: converted(state.module, found, source.path) for key, found in source.sections.items()}
    found = fit(state, source, None)
    if found.mismatched or (found.missing and not missing) or (found.unexpected and not surplus):
        raise CheckpointError(misfit(found.lines, source), where=str(source.path))
    return found


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype in (None, "auto"):
        return None
    found = as_dtype(dtype)
    if not found.is_floating_point or found.itemsize < 2:
        raise CheckpointError(f"dtype={dtype!r} is none to run in", fix="float32, bfloat16, float16, or None")
    return found


def _tensors(
    state: ModelState, found: Fit, reader: StorageReader, dtype: torch.dtype | None
) -> dict[str, StoredTensor]:
    """Where the values of each parameter are, by each of its names."""
    out: dict[str, StoredTensor] = {}
    scales = scales_in(state.module)
    for name in state.parameters:
        kind, stored = None if name in scales else dtype, found.tensors.get(name)
        out[name] = own_values(state.module, name, kind) if stored is None else stored_tensor(stored, kind, reader)
    return out | {alias: out[name] for alias, name in state.aliases.items() if name in out}


def stored_tensor(stored: Stored, dtype: torch.dtype | None, reader: StorageReader) -> StoredTensor:
    """A tensor of files as a parameter of that dtype; ``None``: its own."""
    kind = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
    pieces = _pieces(stored)
    other = (pieces[0], stored.dtype) if len(pieces) == 1 and stored.dtype != kind else None
    convert = partial(reader.read_tensor, stored)
    return StoredTensor(kind, tuple(stored.shape), pieces if stored.dtype == kind else (), convert, other)


def _pieces(stored: Stored) -> tuple[FilePiece, ...]:
    """The bytes of a tensor, if they are in few and long enough pieces to be read as they are."""
    out: list[FilePiece] = []
    width = stored.dtype.itemsize
    for segment in stored.segments:
        short = segment.count > 1 and segment.length * width < _SHORT
        if short or segment.record or segment.layout is not None or stored.values is not None:
            return ()
        for i in range(segment.count):
            at = segment.at + (segment.skip + i * segment.length) * width
            start = (segment.start + i * segment.step) * width
            out.append(FilePiece(segment.file, at, start, segment.length * width))
    if len(out) > _MANY and stored.nbytes < len(out) * _SHORT:
        return ()
    if len(out) == 1 and out[0].at % width:  # no tensor can begin there
        return ()
    return tuple(out)


@torch.no_grad()
def _load_buffers(state: ModelState, found: Fit, device: torch.device) -> None:
    """Persistent buffers come from the files, others are what the model made them. All are on the device."""
    move_buffers(state.module, device, {*state.buffers, *state.aliases})
    named = dict(state.module.named_buffers(remove_duplicate=False))
    with StorageReader() as reader:
        for name in state.buffers:
            stored = found.tensors[name]
            named[name].copy_(reader.values(stored).view(stored.shape))


def move_buffers(model: nn.Module, device: torch.device, awaited: Collection[str] = ()) -> None:
    """Have all buffers on the device.

    Args:
        awaited: names of those that get values afterwards, and may be on the meta device.

    Raises:
        UnitError: another one is on the meta device: nobody knows its values.
    """
    lost = [n for n, b in model.named_buffers(remove_duplicate=False) if b.is_meta and n not in awaited]
    if lost:
        raise UnitError(
            f"buffer '{lost[0]}' is on the meta device, and no file has its values",
            fix="build the model inside init_empty_weights(), which leaves buffers as they are, or set it by hand",
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                there = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                module._buffers[name] = there
