"""Loading: check everything, then put it where it belongs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from shardwise.checkpoint import safe
from shardwise.checkpoint.background import settle_saves
from shardwise.checkpoint.checking import found, read_whole, whole
from shardwise.checkpoint.files import Manifest
from shardwise.checkpoint.filling import Fill
from shardwise.checkpoint.models import ModelState, model_states, parameter_labels
from shardwise.checkpoint.optimizers import OptimizerState
from shardwise.checkpoint.partly import loading, recovery
from shardwise.checkpoint.portions import Portions
from shardwise.checkpoint.progress import Progress
from shardwise.checkpoint.ranks import Together
from shardwise.checkpoint.readback import Readback
from shardwise.checkpoint.storage import METADATA, parse_metadata
from shardwise.comm import World
from shardwise.engine.state_dict import held, publish, units_of
from shardwise.errors import CheckpointError

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
    optimizers: Sequence[Optimizer] = (),
    strict: bool = True,
    verify: bool = False,
    progress: bool = True,
) -> Loaded:
    """Load a checkpoint in place, whatever strategy and number of ranks saved it. Collective.

    Args:
        directory: what :func:`save` returned, or ``folder/latest`` for the newest complete one in a folder.
        models, optimizers: in the order they were saved in.
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

    Buffers that differed between ranks come back as each rank's own at an equal world size, else as rank 0's.
    Cost: each rank reads what it holds, with ``verify`` twice, through buffers of 24 MiB. What lives on a disk is in
    memory one unit at a time.
    """
    settle_saves()
    with recovery(models, optimizers) as recovered:
        loaded = _load(directory, models, optimizers, strict, verify, progress)
        recovered.complete = not loaded.differences
    return loaded


def _load(
    directory: str | os.PathLike[str],
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    strict: bool,
    verify: bool,
    progress: bool,
) -> Loaded:
    world = World.current()
    path, manifest = whole(directory, progress) if verify else found(directory)
    doing = f"loading checkpoint {path}"
    with Together(doing, slow=True):
        own_name = f"rank_{world.rank}.pt"
        names = [METADATA, "state.pt", *([own_name] if own_name in manifest.files else [])]
        small = read_whole(path, manifest.files, names)
        metadata = parse_metadata(small[METADATA], path / METADATA, manifest.files)
        common = _needs(small["state.pt"], path / "state.pt", ("state", "extra", "optimizers"))
        own = _needs(small[own_name], path / own_name, ("rank_state", "buffers")) if own_name in small else None
        states = model_states(models)
        labels = parameter_labels(states)
        steppers = [OptimizerState(i, o, labels) for i, o in enumerate(optimizers)]
        differences = _differences(states, steppers, common, metadata, manifest)
        if differences and strict:
            shown = "\n    ".join(differences[:_SHOWN])
            more = f"\n    and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise CheckpointError(
                f"the checkpoint does not fit:\n    {shown}{more}",
                where=str(path),
                fix="build the model and optimizers as they were when it was saved, or load what fits: strict=False",
            )
        for unit in (unit for s in states for unit in units_of(s.module)):
            unit.settle()
        portions = Portions()
        for s in states:
            _plan(s, metadata, portions)
        for stepper, saved in zip(steppers, common["optimizers"], strict=False):
            stepper.plan(saved, metadata, portions)
        files = Readback(path, manifest.files)
        fill = Fill(files, metadata, portions.tensors)
    with loading([s.module for s in states], path), Progress("loading", fill.nbytes, progress) as files.progress:
        with Together(doing, slow=True):
            for portion in portions:
                with portion.here():
                    fill.put(portion.tensors)
                    for call in portion.after:
                        call()
            for s in states:
                _put_rest(s, common["extra"].get(s.label, {}), own, world.size == manifest.world_size)
        for s in states:
            publish(s.module)
    return Loaded(common["state"], None if own is None else own["rank_state"], manifest, differences)


def _needs(data: bytes, path: Path, keys: Sequence[str]) -> dict[str, Any]:
    value = safe.loads(data, path)
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise CheckpointError("not the file that Shardwise wrote", where=str(path), fix="load another checkpoint")
    return value


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
    for s in states:
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


def _plan(s: ModelState, metadata: Metadata, portions: Portions) -> None:
    """The model's tensors that the checkpoint has with the same shape are to be filled."""
    found: dict[str, Any] = metadata.state_dict_metadata
    for name, tensor in s.tensors(everything=True).items():
        key = f"{s.label}.{name}"
        if key in found and tuple(found[key].size) == tuple(tensor.shape):
            param = s.parameters.get(name)
            portions.of(None if param is None else held(param)).tensors[key] = tensor


def _put_rest(s: ModelState, extra: Mapping[str, Any], own: Mapping[str, Any] | None, same_size: bool) -> None:
    for name, owner in s.extra.items():
        if name in extra:
            owner.set_extra_state(extra[name])
    if own is not None and same_size:
        for name, value in own["buffers"].get(s.label, {}).items():
            if name in s.buffers and s.buffers[name].shape == value.shape:
                s.buffers[name].copy_(value)
