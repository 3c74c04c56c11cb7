"""Folders that DeepSpeed wrote under ZeRO stage 0, 1, 2 or 3, and "universal" ones: every tensor in them, by name.

Weights are fp32 where there are any. Optimizer state is told apart by the parameter it belongs to, whatever the ranks
held that wrote it. Nothing is read but indexes: a tensor is where its bytes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.checkpoint.deepspeed_folder import Folder, read_folder, shapes, step_folder
from shardwise.checkpoint.deepspeed_groups import (
    OptimizerGroup,
    flat_groups,
    joined,
    partitioned_groups,
    universal_groups,
    whole_groups,
)
from shardwise.checkpoint.stored_tensor import Section, Source, Stored
from shardwise.naming import clean_names

__all__ = ["ReadFolder", "open_folder", "read", "step_folder"]


@dataclass
class ReadFolder:
    """What is in a folder.

    Args:
        folder: its files.
        weights: whole tensors by name; masters in fp32 where the optimizer has them, else what the model computed with.
        groups: of the optimizer; ``None``: there is no optimizer in it.
        flat: stage 0 with all of a group's parameters in one tensor: only their shapes say where they are.
    """

    folder: Folder
    weights: dict[str, Stored]
    groups: list[OptimizerGroup] | None
    flat: bool = False

    def facts(self) -> dict[str, Any]:
        first = self.folder.first
        facts = {"stage": self.folder.stage, "world size": first.get("dp_world_size")}
        facts |= {"step": first.get("global_steps"), "skipped steps": first.get("skipped_steps")}
        facts |= {"samples": first.get("global_samples"), "version of DeepSpeed": first.get("ds_version")}
        facts = {k: v for k, v in facts.items() if isinstance(v, (int, str))}
        return facts | ({"universal": "yes"} if self.folder.universal is not None else {})


def open_folder(path: Path) -> Source:
    """All tensors of a folder of DeepSpeed, with the partitions of all ranks put together.

    Raises:
        CheckpointError: a file is missing or damaged; tensor, pipeline or expert parallelism.
    """
    found = read(step_folder(path) or path)
    sections: dict[Section, dict[str, Stored]] = {("model",): found.weights}
    for g, group in enumerate(found.groups or ()):
        for i, state in enumerate(group.state):
            name = group.params[i] if group.params else f"group{g}.{i}"
            if tensors := {key: value for key, value in state.items() if isinstance(value, Stored)}:
                sections["optimizer", "state", name] = tensors
    return Source(found.folder.path, "deepspeed", sections, found.facts(), dict.fromkeys(found.folder.files, 0))


def read(path: Path) -> ReadFolder:
    """Everything in one step's folder.

    Raises:
        CheckpointError: see :func:`open_folder`.
    """
    folder = read_folder(path)
    groups: list[OptimizerGroup] | None = None
    flat = False
    if folder.optims and folder.stage <= 2:
        groups = flat_groups(folder)
    elif folder.optims:
        groups = partitioned_groups(folder)
    elif folder.universal is not None:
        groups = universal_groups(folder)
    elif isinstance(folder.first.get("optimizer"), Mapping):
        groups, flat = whole_groups(folder, folder.first["optimizer"])
    out = {n: t for group in groups or () for n, t in zip(group.params, group.masters, strict=bool(group.params))}
    weights = _weights(folder, out)
    names = clean_names(weights.keys())
    for group in groups or ():
        group.params = [names[name] for name in group.params]
    return ReadFolder(folder, {names[name]: t for name, t in weights.items()}, groups, flat)


def _weights(folder: Folder, masters: Mapping[str, Stored]) -> dict[str, Stored]:
    first, out = folder.first, dict(masters)
    module = first["module"]
    known = {str(name): value for name, value in module.items() if isinstance(value, Stored)}
    if folder.stage == 3:
        for name, shape in shapes([first.get("frozen_param_shapes") or {}])[0]:
            pieces = [_fragment(folder, model, name) for model in folder.models]
            out[name] = joined(folder, name, shape, [(piece, 0, piece.numel) for piece in pieces])
        buffers = {str(name) for name in first.get("buffer_names") or ()}
        known = {name: value for name, value in known.items() if name in buffers}
    for alias, name in (first.get("shared_params") or {}).items():
        if str(name) in out:
            out[str(alias)] = out[str(name)]
    order = {str(name): i for i, name in enumerate(module)}
    return dict(sorted({**known, **out}.items(), key=lambda item: order.get(item[0], len(order))))


def _fragment(folder: Folder, model: Mapping[str, Any], name: str) -> Stored:
    found = (model.get("frozen_param_fragments") or {}).get(name)
    if not isinstance(found, Stored):
        raise folder.damaged(f"the frozen parameter '{name}' is missing")
    return found


def buffers_of(path: Path) -> list[str]:
    """Names of the model's buffers."""
    return [str(name) for name in read_folder(path).first.get("buffer_names") or ()]
