"""Loading: check everything, then put it where it belongs, whatever the ranks held that wrote it."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from shardwise.checkpoint import directory as directories
from shardwise.checkpoint.contents import Contents
from shardwise.checkpoint.coordination import CollectiveBlock, Progress
from shardwise.checkpoint.deepspeed_contents import contents_of
from shardwise.checkpoint.deepspeed_format import step_folder
from shardwise.checkpoint.directory import locate_verified, read_whole
from shardwise.checkpoint.formats import parse_metadata
from shardwise.checkpoint.incomplete_load import incomplete_on_error, recovery
from shardwise.checkpoint.load_plan import LoadPlan
from shardwise.checkpoint.manifest import METADATA, Manifest, entries_at
from shardwise.checkpoint.model_state import LoadBatches, ModelState, model_states, parameter_labels
from shardwise.checkpoint.optimizer_state import OptimizerState
from shardwise.checkpoint.own_state import clean, cleaned, parts_of
from shardwise.checkpoint.saving import settle_saves
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.comm import World
from shardwise.engine.state_dict import held, publish, units_of
from shardwise.errors import CheckpointError
from shardwise.naming import clean_name

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
        directory: what :func:`save` returned, or ``folder/latest`` for the newest complete one in a folder. Or a folder
            that DeepSpeed wrote, under any stage and on any number of ranks, "universal" or not: one step's, or the one
            with the file ``latest`` in it.
        models, optimizers: in the order they were saved in. ``optimizers=None``: leave the state of optimizers out,
            whatever is there.
        excluded: those of ``models`` whose values somebody else loads. What optimizers have of them is loaded.
        strict: raise if names, shapes or groups differ. Otherwise load what fits and list the rest.
        verify: compare every byte with its checksum before anything changes. Otherwise each block is compared when it
            is its turn. DeepSpeed's folders have no checksums.
        progress: show a bar on rank 0, if it has a terminal and this takes longer than a second.

    Returns:
        The small state, for the caller to put back. Of DeepSpeed's folders ``state`` has ``scheduler``, ``loss_scaler``
        (by the names that DeepSpeed's own has), ``client_state``, ``global_steps``, ``skipped_steps`` and
        ``global_samples``; what the folder does not have is ``None``, or 0.

    Raises:
        CheckpointError: on every rank. Nothing has changed if the directory is missing, not a checkpoint or of a newer
            format, a file is missing or too short, or its contents do not fit. Bytes that have changed are found when
            they are read, and never used; a model that was loaded in part by then refuses to run and to be saved
            until a load into it is complete. With ``verify`` nothing has changed then either.

    Buffers that differed between ranks come back as each rank's own at an equal world size, else as rank 0's.
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
    path, manifest = _located(directory, verify, progress)
    doing = f"loading checkpoint {path}"
    with CollectiveBlock(doing, slow=True) as ranks:
        states = model_states(models, excluded)
        labels = parameter_labels(states)
        steppers = [OptimizerState(i, o, labels) for i, o in enumerate(optimizers or ())]
        found = contents_of(path, steppers) if manifest is None else _own_contents(path, manifest, world)
        common, own, metadata = found.common, found.own, found.metadata
        differences = _differences(states, None if optimizers is None else steppers, common, metadata, found.manifest)
        if differences and strict:
            shown = "\n    ".join(differences[:_SHOWN])
            more = f"\n    and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise CheckpointError(
                f"the checkpoint does not fit:\n    {shown}{more}",
                where=str(path),
                fix="build the model and optimizers as they were when it was saved, or load what fits: strict=False",
            )
        ranks.mine = _seen(metadata)
    with CollectiveBlock(doing, slow=True):
        if ranks.gathered[0] != _seen(metadata):
            raise CheckpointError(
                "rank 0 sees other files under this path than this rank",
                where=str(path),
                fix="put them on a file system that all hosts share, or copy the same files to every host",
            )
        for unit in (unit for s in states for unit in units_of(s.module)):
            unit.finish_transfers()
        batches = LoadBatches()
        filled = [s for s in states if not s.excluded]
        for s in filled:
            _plan(s, metadata, batches)
        for stepper, saved in zip(steppers, common["optimizers"], strict=False):
            stepper.plan(saved, metadata, batches)
        bar = Progress("loading", 0, progress)
        plan = found.plan(batches.tensors, bar.add)
        bar.total = plan.nbytes
    with incomplete_on_error([s.module for s in filled], path), bar:
        with CollectiveBlock(doing, slow=True):
            for batch in batches:
                with batch.in_memory():
                    plan.read(batch.tensors)
                    batch.filled()
                plan.forget(batch.tensors)
                batch.tensors.clear()  # what went to a disk is not to stay in memory as well
            for s in filled:
                _put_rest(s, common["extra"].get(s.label, {}), own, world.size == found.manifest.world_size)
        for s in filled:
            publish(s.module)
    for line in found.left_out if world.rank == 0 else ():
        warnings.warn(f"{path}: not read: {line}", stacklevel=4)
    return Loaded(common["state"], None if own is None else own["rank_state"], found.manifest, differences)


def _located(directory: str | os.PathLike[str], verify: bool, progress: bool) -> tuple[Path, Manifest | None]:
    """Where a checkpoint's files are, and its manifest if it is one of ours. Collective: rank 0 looks."""
    path = Path(directories.by_first(directory, lambda given: step_folder(given) or directories.resolve(given)))
    with CollectiveBlock(f"reading checkpoint {path}"):
        if step_folder(path) is not None:
            return path, None
        manifest = directories.present(path)
    return (path, manifest) if not verify else locate_verified(path, progress)


def _seen(metadata: Metadata) -> bytes:
    """The same on all ranks that see the same tensors."""
    entries: dict[str, Any] = metadata.state_dict_metadata
    return str(zlib.crc32(repr([(name, tuple(entry.size)) for name, entry in entries.items()]).encode())).encode()


def _own_contents(path: Path, manifest: Manifest, world: World) -> Contents:
    own_name = f"rank_{world.rank}.pt"
    names = [METADATA, "state.pt", *([own_name] if own_name in manifest.files else [])]
    small = read_whole(path, manifest.files, names)
    metadata = parse_metadata(small[METADATA], path / METADATA, manifest.files)
    common = parts_of(small["state.pt"], path / "state.pt")
    own = parts_of(small[own_name], path / own_name, ("rank_state", "buffers")) if own_name in small else None
    clean(common)
    if own is not None:
        own["buffers"] = {label: cleaned(found) for label, found in own["buffers"].items()}
    entries = entries_at(path, manifest.files)
    return Contents(
        path, manifest, metadata, common, own,
        lambda tensors, seen: LoadPlan(path, StorageReader(entries, seen), metadata, tensors),
    )  # fmt: skip


def _differences(
    states: Sequence[ModelState],
    steppers: Sequence[OptimizerState] | None,
    common: Mapping[str, Any],
    metadata: Metadata,
    manifest: Manifest,
) -> list[str]:
    out: list[str] = []
    for what, given, saved in (("models", states, manifest.models), ("optimizers", steppers, manifest.optimizers)):
        if given is not None and len(given) != len(saved):
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
        left_out = {clean_name(name) for name in common.get("left_out", {}).get(s.label, ())}
        for name, tensor in mine.items():
            if name in left_out and not tensor.requires_grad:
                continue
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
    for stepper, saved_optimizer in zip(steppers or (), common["optimizers"], strict=False):
        out += stepper.differences(saved_optimizer, metadata)
    return out


def _same_place(metadata: Metadata, a: str, b: str) -> bool:
    if metadata.storage_data is None:  # files of others
        return bool(metadata.planner_data[a] == metadata.planner_data[b])

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
