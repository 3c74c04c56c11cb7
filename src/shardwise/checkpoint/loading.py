"""Loading: check everything, then put it where it belongs, whatever the ranks held that wrote it."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.optim import Optimizer

from shardwise.checkpoint import small_state
from shardwise.checkpoint.coordination import CollectiveBlock, Progress
from shardwise.checkpoint.directory import locate, locate_verified, read_whole
from shardwise.checkpoint.formats import parse_metadata
from shardwise.checkpoint.incomplete_load import incomplete_on_error, recovery
from shardwise.checkpoint.manifest import METADATA, Manifest, entries_at
from shardwise.checkpoint.model_state import (
    LoadBatches,
    ModelState,
    model_states,
    parameter_labels,
)
from shardwise.checkpoint.optimizer_state import OptimizerState
from shardwise.checkpoint.saving import settle_saves
from shardwise.checkpoint.storage_reader import Run, StorageReader
from shardwise.checkpoint.torch_format import archivable, archive_around
from shardwise.comm import World
from shardwise.engine.state_dict import held, publish, units_of
from shardwise.errors import CheckpointError
from shardwise.layout import row_strides
from shardwise.naming import clean_name

_AT_ONCE = 256 << 20  # bytes of tensors that are taken apart
_CANNOT_READ = (pickle.PickleError, RuntimeError, ValueError, AssertionError, EOFError, KeyError)


@dataclass(frozen=True)
class _Item:
    """A box of one stored tensor.

    Args:
        name: of the tensor.
        target: makes the tensor that takes the box, when its turn comes.
        file, start, nbytes: the bytes that hold it: a run of the tensor's memory, or all of what ``torch.save`` made.
        before: what must stand before the tensor's memory, and where; ``None``: ``torch.load`` reads it.
        dtype, strides: of the stored tensor.
        box: offsets and lengths in the stored tensor.
    """

    name: str
    target: Callable[[], torch.Tensor]
    file: Path
    start: int
    nbytes: int
    before: tuple[int, bytes] | None
    dtype: torch.dtype
    strides: tuple[int, ...]
    box: tuple[torch.Size, torch.Size]

    def run(self, target: torch.Tensor) -> Run | None:
        """The box as elements in a row, if that is what it is in the file and in the target."""
        if self.before is None or not target.is_contiguous() or self.nbytes != target.numel() * self.dtype.itemsize:
            return None
        run = Run(self.file, self.start, self.dtype, target.view(-1))
        return run if run.straight or self.start % self.dtype.itemsize == 0 else None

    def values(self, raw: torch.Tensor) -> torch.Tensor:
        """The box, from all of its bytes."""
        if self.before is not None:
            return torch.as_strided(raw.view(self.dtype), self.box[1], self.strides)
        whole = torch.load(io.BytesIO(raw.numpy().data), map_location="cpu", weights_only=True)
        for dim, (offset, length) in enumerate(zip(*self.box, strict=True)):
            whole = whole.narrow(dim, offset, length)
        return whole


class LoadPlan:
    """Fills tensors in place.

    Args:
        path: of the checkpoint.
        reader: of its files.
        metadata: its index.
        tensors: by name; all of them are in the checkpoint with the same shape. Their memory is not looked at before
            it is their turn in :meth:`read`.
    """

    def __init__(self, path: Path, reader: StorageReader, metadata: Metadata, tensors: dict[str, torch.Tensor]) -> None:
        self._path, self._reader, self._tensors = path, reader, tensors
        stored: dict[str, Any] = metadata.state_dict_metadata
        sizes = {(name, tuple(c.offsets)): tuple(c.sizes) for name in tensors for c in stored[name].chunks}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(cast(Any, tensors), metadata, True)
        plan = planner.finish_plan(planner.create_local_plan())
        self._items: dict[str, list[_Item]] = {}
        for read in plan.items:
            item = _item(path, read, metadata, sizes, planner)
            self._items.setdefault(item.name, []).append(item)

    @property
    def nbytes(self) -> int:
        """Of all tensors, in the files."""
        return sum(item.nbytes for items in self._items.values() for item in items)

    def read(self, names: Collection[str]) -> None:
        """Let tensors have their values.

        Args:
            names: which.

        Raises:
            CheckpointError: a file is missing or damaged, or does not hold what the index says. Some tensors may have
                changed.

        Cost: nothing for runs of elements. What has to be taken apart is in host memory, some tensors at a time.
        """
        runs: list[Run] = []
        heads: list[tuple[_Item, torch.Tensor]] = []
        others: list[list[tuple[_Item, torch.Tensor]]] = [[]]
        held = 0
        for item in (item for name in names for item in self._items.get(name, ())):
            target = item.target()
            run = item.run(target)
            if run is not None and item.before is not None:
                head = torch.empty(len(item.before[1]), dtype=torch.uint8)
                runs += [run, Run(item.file, item.before[0], torch.uint8, head)]
                heads.append((item, head))
                continue
            if held and held + item.nbytes > _AT_ONCE:
                others.append([])
                held = 0
            others[-1].append((item, target))
            held += item.nbytes
        self._reader.read(runs)
        for item, head in heads:
            assert item.before is not None
            if head.numpy().tobytes() != item.before[1]:
                raise self._unreadable(f"'{item.name}' is not stored as the index says")
        for batch in others:
            self._take_apart(batch)

    def forget(self, names: Collection[str]) -> None:
        """Hold tensors no longer."""
        for name in names:
            self._items.pop(name, None)
            del self._tensors[name]

    def _take_apart(self, batch: Sequence[tuple[_Item, torch.Tensor]]) -> None:
        raws = [torch.empty(item.nbytes, dtype=torch.uint8) for item, _ in batch]
        pairs = zip(batch, raws, strict=True)
        self._reader.read(Run(item.file, item.start, torch.uint8, raw) for (item, _), raw in pairs)
        for (item, target), raw in zip(batch, raws, strict=True):
            try:
                values = item.values(raw)
                if values.shape != target.shape:
                    raise ValueError(f"'{item.name}' has another shape than the index says")
                target.copy_(values)
            except _CANNOT_READ as error:
                line = str(error).splitlines()[0] if str(error) else ""
                raise self._unreadable(f"its tensors cannot be read ({type(error).__name__}: {line})") from error

    def _unreadable(self, what: str) -> CheckpointError:
        return CheckpointError(
            what, where=str(self._path), fix="load another checkpoint, and find out who changed this one"
        )


def _item(
    path: Path,
    read: ReadItem,
    metadata: Metadata,
    sizes: Mapping[tuple[str, tuple[int, ...]], Sequence[int]],
    planner: DefaultLoadPlanner,
) -> _Item:
    index: MetadataIndex = read.storage_index
    info = cast(Any, metadata.storage_data)[index]
    dtype = cast(Any, metadata.state_dict_metadata[index.fqn]).properties.dtype
    size = tuple(sizes[index.fqn, tuple(index.offset or ())])
    box = (torch.Size(read.storage_offsets), torch.Size(read.lengths))
    strides = row_strides(size)
    target = partial(_target, planner, read)
    item = _Item(index.fqn, target, path / info.relative_path, info.offset, info.length, None, dtype, strides, box)
    if not archivable(dtype):
        return item
    before, after = archive_around(dtype, size)
    if info.length != len(before) + prod(size) * dtype.itemsize + len(after):
        return item
    first = sum(o * s for o, s in zip(box[0], strides, strict=True))
    count = sum((n - 1) * s for n, s in zip(box[1], strides, strict=True)) + 1 if prod(box[1]) else 0
    start = info.offset + len(before) + first * dtype.itemsize
    return replace(item, before=(info.offset, before), start=start, nbytes=count * dtype.itemsize)


def _target(planner: DefaultLoadPlanner, read: ReadItem) -> torch.Tensor:
    return planner.resolve_tensor(read).detach()


# --- loading -------------------------------------------------------------------------------------
_SHOWN = 10  # differences that an error lists


@dataclass(frozen=True)
class Loaded:
    """What :func:`load` found beside models and optimizers.

    Args:
        state: what was saved as ``state``; tensors are on the CPU.
        rank_state: what this rank saved; ``None`` if the saving run had no such rank.
        manifest: facts about the checkpoint.
        differences: with ``strict=False``, what did not fit and was left as it is.
    """

    state: dict[str, Any]
    rank_state: dict[str, Any] | None
    manifest: Manifest
    differences: list[str] = field(default_factory=list)


@torch.no_grad()
def load(
    directory: str | os.PathLike[str],
    *,
    models: Sequence[nn.Module] = (),
    excluded: Collection[nn.Module] = (),
    optimizers: Sequence[Optimizer] | None = (),
    strict: bool = True,
    verify: bool = False,
    progress: bool = True,
) -> Loaded:
    """Load a checkpoint in place, whatever strategy and number of ranks saved it. Collective.

    Args:
        directory: what :func:`save` returned, or ``folder/latest`` for the newest complete one in a folder.
        models, optimizers: in the order they were saved in. ``None``: what the checkpoint has of optimizers is not
            wanted.
        excluded: those of ``models`` whose values somebody else loads. What optimizers have of them is loaded.
        strict: raise if names, shapes or groups differ. Otherwise load what fits and list the rest.
        verify: compare every byte with its checksum before anything changes. Otherwise each block is compared when it
            is its turn.
        progress: show a bar on rank 0, if it has a terminal and this takes longer than a second.

    Returns:
        The small state, for the caller to put back.

    Raises:
        CheckpointError: on every rank. Nothing has changed if the directory is missing, not a checkpoint or of a newer
            format, a file is missing or too short, or its contents do not fit. Bytes that have changed are found when
            they are read, and never used; a model that was loaded in part by then refuses to run and to be saved
            until a load into it is complete. With ``verify`` nothing has changed then either.

    BlockBuffers that differed between ranks come back as each rank's own at an equal world size, else as rank 0's.
    Cost: each rank reads what it holds, with ``verify`` twice, through buffers of 24 MiB. What lives on a disk is in
    memory one unit at a time.
    """
    settle_saves()
    mine = [model for model in models if not any(model is other for other in excluded)]
    with recovery(mine, optimizers or ()) as recovered:
        loaded = _load(directory, models, excluded, optimizers, strict, verify, progress)
        recovered.complete = not loaded.differences
    return loaded


def _load(
    directory: str | os.PathLike[str],
    models: Sequence[nn.Module],
    excluded: Collection[nn.Module],
    optimizers: Sequence[Optimizer] | None,
    strict: bool,
    verify: bool,
    progress: bool,
) -> Loaded:
    world = World.current()
    path, manifest = locate_verified(directory, progress) if verify else locate(directory)
    doing = f"loading checkpoint {path}"
    with CollectiveBlock(doing, slow=True):
        own_name = f"rank_{world.rank}.pt"
        names = [METADATA, "state.pt", *([own_name] if own_name in manifest.files else [])]
        small = read_whole(path, manifest.files, names)
        metadata = parse_metadata(small[METADATA], path / METADATA, manifest.files)
        common = _needs(small["state.pt"], path / "state.pt", ("state", "extra", "optimizers"))
        own = _needs(small[own_name], path / own_name, ("rank_state", "buffers")) if own_name in small else None
        _clean(common, own)
        states = model_states(models, excluded)
        labels = parameter_labels(states)
        steppers = [OptimizerState(i, o, labels) for i, o in enumerate(optimizers or ())]
        wanted = manifest if optimizers is not None else replace(manifest, optimizers=[])
        differences = _differences(states, steppers, common, metadata, wanted)
        if differences and strict:
            shown = "\n    ".join(differences[:_SHOWN])
            more = f"\n    and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise CheckpointError(
                f"the checkpoint does not fit:\n    {shown}{more}",
                where=str(path),
                fix="build the model and optimizers as they were when it was saved, or load what fits: strict=False",
            )
        for unit in (unit for s in states for unit in units_of(s.module)):
            unit.finish_transfers()
        batches = LoadBatches()
        filled = [s for s in states if not s.excluded]
        for s in filled:
            _plan(s, metadata, batches)
        for stepper, saved in zip(steppers, common["optimizers"], strict=False):
            stepper.plan(saved, metadata, batches)
        reader = StorageReader(entries_at(path, manifest.files))
        plan = LoadPlan(path, reader, metadata, batches.tensors)
    with incomplete_on_error([s.module for s in filled], path), Progress("loading", plan.nbytes, progress) as bar:
        reader.seen = bar.add
        with CollectiveBlock(doing, slow=True):
            for batch in batches:
                with batch.in_memory():
                    plan.read(batch.tensors)
                    batch.filled()
                plan.forget(batch.tensors)
                batch.tensors.clear()  # what went to a disk is not to stay in memory as well
            for s in filled:
                _put_rest(s, common["extra"].get(s.label, {}), own, world.size == manifest.world_size)
        for s in filled:
            publish(s.module)
    return Loaded(common["state"], None if own is None else own["rank_state"], manifest, differences)


def _needs(data: bytes, path: Path, keys: Sequence[str]) -> dict[str, Any]:
    value = small_state.loads(data, path)
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise CheckpointError("not the file that Shardwise wrote", where=str(path), fix="load another checkpoint")
    return value


def _clean(common: dict[str, Any], own: dict[str, Any] | None) -> None:
    """Leave wrappers' components out of the names in small state, as in those of tensors."""

    def cleaned(by_name: Mapping[str, Any]) -> dict[str, Any]:
        return {clean_name(name): value for name, value in by_name.items()}

    common["extra"] = {label: cleaned(found) for label, found in common["extra"].items()}
    for saved in common["optimizers"]:
        saved["state"] = cleaned(saved["state"])
        for group in saved["groups"]:
            group["params"] = [clean_name(name) for name in group["params"]]
    if own is not None:
        own["buffers"] = {label: cleaned(found) for label, found in own["buffers"].items()}


def _differences(
    states: Sequence[ModelState],
    steppers: Sequence[OptimizerState],
    common: Mapping[str, Any],
    metadata: Metadata,
    manifest: Manifest,
) -> list[str]:
    out: list[str] = []
    for what, given, saved in (("models", states, manifest.models), ("optimizers", steppers, manifest.optimizers)):
        if len(given) != len(saved):
            out.append(f"{len(given)} {what} were given, the checkpoint has {len(saved)}: {', '.join(saved)}")
    stored: dict[str, Any] = metadata.state_dict_metadata
    labels = {s.label for s in states[: len(manifest.models)]}  # of those that the checkpoint has too
    for s in states:
        if s.excluded:
            continue
        if s.label in labels and s.label not in common["extra"]:
            out.append(f"{s.label}: its values are not in the checkpoint, for they were excluded when it was saved")
            continue
        prefix = f"{s.label}."
        saved_names = {name[len(prefix) :] for name in stored if name.startswith(prefix)}
        mine = {**s.parameters, **s.buffers}
        names = mine.keys() | s.aliases.keys()
        for name, tensor in mine.items():
            if name not in saved_names:
                out.append(f"{s.label}: '{name}' is not in the checkpoint")
            elif tuple(stored[prefix + name].size) != tuple(tensor.shape):
                size = tuple(stored[prefix + name].size)
                out.append(f"{s.label}: '{name}' has shape {size} in the checkpoint, not {tuple(tensor.shape)}")
        out += [f"{s.label}: '{name}' is in the checkpoint only" for name in sorted(saved_names - names)]
        for alias, name in s.aliases.items():
            if {alias, name} <= saved_names and not _same_place(metadata, prefix + alias, prefix + name):
                out.append(f"{s.label}: '{alias}' and '{name}' are tied, and two tensors in the checkpoint")
        saved_extra = common["extra"].get(s.label, {})
        out += [f"{s.label}: '{name}' is on one side only" for name in sorted(s.extra.keys() ^ saved_extra.keys())]
    for stepper, saved_optimizer in zip(steppers, common["optimizers"], strict=False):
        out += stepper.differences(saved_optimizer, metadata)
    return out


def _same_place(metadata: Metadata, a: str, b: str) -> bool:
    def places(name: str) -> list[tuple[str, int]]:
        infos = [info for index, info in metadata.storage_data.items() if index.fqn == name]
        return sorted((info.relative_path, info.offset) for info in infos)

    return places(a) == places(b)


def _plan(s: ModelState, metadata: Metadata, batches: LoadBatches) -> None:
    """The model's tensors that the checkpoint has with the same shape are to be filled."""
    found: dict[str, Any] = metadata.state_dict_metadata
    for name, tensor in s.tensors(everything=True).items():
        key = f"{s.label}.{name}"
        if key in found and tuple(found[key].size) == tuple(tensor.shape):
            param = s.parameters.get(name)
            batches.of(None if param is None else held(param)).tensors[key] = tensor


def _put_rest(s: ModelState, extra: Mapping[str, Any], own: Mapping[str, Any] | None, same_size: bool) -> None:
    for name, owner in s.extra.items():
        if name in extra:
            owner.set_extra_state(extra[name])
    if own is not None and same_size:
        for name, value in own["buffers"].get(s.label, {}).items():
            if name in s.buffers and s.buffers[name].shape == value.shape:
                s.buffers[name].copy_(value)
