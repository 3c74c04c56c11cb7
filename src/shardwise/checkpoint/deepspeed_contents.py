"""A folder of DeepSpeed in the terms of our own checkpoints: what :func:`shardwise.checkpoint.load` fills from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.contents import Contents, StoredPlan, metadata_of
from shardwise.checkpoint.deepspeed_format import ReadFolder, read
from shardwise.checkpoint.deepspeed_groups import OptimizerGroup
from shardwise.checkpoint.deepspeed_state import small_state_of
from shardwise.checkpoint.manifest import FileEntry, Manifest
from shardwise.checkpoint.optimizer_state import NUMBERS, OptimizerEntry, OptimizerState
from shardwise.checkpoint.stored_tensor import Segment, Stored
from shardwise.engine.optimizer_state import PER_PARAMETER
from shardwise.errors import CheckpointError

_HOW = {"foreach", "fused", "capturable", "differentiable", "params"}
"""How an optimizer computes is not what a checkpoint says: the device that goes on may be another one."""


def contents_of(path: Path, steppers: Sequence[OptimizerState]) -> Contents:
    """Everything in one step's folder.

    Args:
        path: of :func:`~shardwise.checkpoint.deepspeed_format.step_folder`.
        steppers: the optimizers to fill: under stage 0 a folder numbers its parameters, and they have the names.

    Raises:
        CheckpointError: a file is missing or damaged, or its optimizer has other groups.
    """
    found = read(path)
    first = found.folder.first
    stepper = steppers[0] if steppers else None
    stored = {f"model.{name}": tensor for name, tensor in found.weights.items()}
    optimizers: list[dict[str, Any]] = []
    for groups in [] if found.groups is None else [found.groups]:
        if stepper is not None and not all(group.params for group in groups):
            groups = _numbered(found, groups, stepper)
            _use_masters(stored, groups, stepper)
        optimizers.append(_optimizer(groups, stepper, stored))
    state, extra, left_out = small_state_of(found.folder)
    steps = first.get("global_steps")
    world = first.get("dp_world_size")
    manifest = Manifest(
        world_size=world if isinstance(world, int) else 1,
        strategies=[f"stage {found.folder.stage} of DeepSpeed"],
        models=["a model of DeepSpeed"],
        optimizers=["an optimizer of DeepSpeed"] * len(optimizers),
        torch="",
        saved_at=max(file.stat().st_mtime for file in found.folder.files),
        files={file.name: FileEntry(file.stat().st_size, []) for file in found.folder.files},
        info={"deepspeed": str(first.get("ds_version", "")), **({"step": steps} if isinstance(steps, int) else {})},
    )
    common = {"state": state, "extra": {"model": extra}, "optimizers": optimizers}
    return Contents(
        path, manifest, metadata_of(stored), common, None,
        lambda tensors, seen: StoredPlan(stored, tensors, seen), left_out,
    )  # fmt: skip


def _optimizer(
    groups: Sequence[OptimizerGroup], stepper: OptimizerState | None, stored: dict[str, Stored]
) -> dict[str, Any]:
    """What our own ``state.pt`` says about an optimizer. Its tensors go to ``stored``."""
    kinds: dict[str, dict[str, str]] = {}
    said: list[dict[str, Any]] = []
    for g, group in enumerate(groups):
        known = _known(stepper, g)
        keys = None if known is None else {*known, "initial_lr"}
        values = {k: v for k, v in group.values.items() if k not in _HOW and (keys is None or k in keys)}
        said.append({"params": list(group.params), "values": values})
        for name, state in zip(group.params, group.state, strict=True):
            if state and "step" not in state and "step" in group.values and "step" not in (known or {}):
                state = {"step": group.values["step"], **state}  # where apex-like optimizers count
            if state:
                kinds[name] = {}
            for key, value in state.items():
                kind, tensor = _kind(key, value, name, stored, stepper)
                if kind is not None:
                    kinds[name][key] = kind
                if tensor is not None:
                    stored[f"optimizer.state.{name}.{key}"] = tensor
    _add_empty(said, stepper)
    return {"groups": said, "named": {}, "extra": {}, "state": kinds}


def _add_empty(said: Sequence[dict[str, Any]], stepper: OptimizerState | None) -> None:
    """DeepSpeed takes parameters without elements out of the optimizer. Ours may have them."""
    there = {name for group in said for name in group["params"]}
    for group, entries in zip(said, [] if stepper is None else stepper.groups, strict=False):
        group["params"] += [e.label for e in entries if not prod(e.shape) and e.label not in there]


def _known(stepper: OptimizerState | None, g: int) -> Mapping[str, Any] | None:
    if stepper is None:
        return None
    groups = stepper.optimizer.param_groups
    return groups[min(g, len(groups) - 1)] if groups else {}


def _kind(
    key: str, value: Any, name: str, stored: Mapping[str, Stored], stepper: OptimizerState | None
) -> tuple[str | None, Stored | None]:
    """How our own checkpoints would hold a value of an optimizer's state."""
    if value is None:
        return "none", None
    if isinstance(value, Stored):
        weight = stored.get(f"model.{name}")
        sliced = key not in PER_PARAMETER and (value.shape == weight.shape if weight else bool(value.shape))
        return ("sliced" if sliced else "whole"), value
    if type(value) in (int, float) and key == "step" and _counts_in_tensors(stepper):
        return "whole", Stored(torch.float32, (), values=torch.tensor(float(value)))
    for kind, (python, dtype) in NUMBERS.items():
        if type(value) is python:
            return kind, Stored(dtype, (), values=torch.tensor(value, dtype=dtype))
    return None, None


def _counts_in_tensors(stepper: OptimizerState | None) -> bool:
    """torch.optim's own want ``step`` as a tensor, wherever another optimizer counted."""
    return stepper is not None and any(
        c.__module__.startswith("torch.optim.")
        for c in type(stepper.optimizer).__mro__
        if c is not torch.optim.Optimizer
    )


# --- stage 0: by number --------------------------------------------------------------------------------
def _numbered(found: ReadFolder, groups: Sequence[OptimizerGroup], stepper: OptimizerState) -> list[OptimizerGroup]:
    """The groups with the names that the optimizer to fill has at the same places."""
    out = []
    counts = [len(group.state) for group in groups]
    mine = [len(entries) for entries in stepper.groups]
    if len(groups) != len(mine) or (not found.flat and counts != mine):
        raise CheckpointError(
            f"its optimizer has groups of {counts} parameters, the one here of {mine}: stage 0 has no names for them",
            where=str(found.folder.path), fix="build the optimizer with the groups it had when this was saved",
        )  # fmt: skip
    for group, entries in zip(groups, stepper.groups, strict=True):
        one = OptimizerGroup([entry.label for entry in entries], group.values, group.state, group.masters)
        if found.flat:
            one = _unflattened(found, one, entries)
        for entry, state in zip(entries, one.state, strict=True):
            for key, value in state.items():
                if isinstance(value, Stored) and value.shape and value.shape != entry.shape:
                    raise CheckpointError(
                        f"'{key}' at the place of '{entry.label}' has shape {value.shape}, not {entry.shape}",
                        where=str(found.folder.path),
                        fix="build the model and the optimizer's groups as they were when this was saved",
                    )
        out.append(one)
    return out


def _unflattened(found: ReadFolder, group: OptimizerGroup, entries: Sequence[OptimizerEntry]) -> OptimizerGroup:
    """A group whose parameters lie end to end in one tensor."""
    total = sum(prod(entry.shape) for entry in entries)
    for tensor in (*group.masters, *(v for state in group.state for v in state.values())):
        if isinstance(tensor, Stored) and tensor.shape and tensor.numel < total:
            raise found.folder.damaged(f"the optimizer has {tensor.numel} elements, the one here {total}")
    out = OptimizerGroup(group.params, group.values)
    at = 0
    for entry in entries:
        state = group.state[0] if group.state else {}
        out.state.append({k: _part(v, at, entry.shape) for k, v in state.items()})
        out.masters += [_part(t, at, entry.shape) for t in group.masters]
        at += prod(entry.shape)
    return out


def _part(value: Any, at: int, shape: tuple[int, ...]) -> Any:
    if not isinstance(value, Stored) or not value.shape:
        return value
    whole = value.segments[0]
    return Stored(value.dtype, shape, (Segment(whole.file, whole.at, 0, prod(shape), skip=whole.skip + at),))


def _use_masters(stored: dict[str, Stored], groups: Sequence[OptimizerGroup], stepper: OptimizerState) -> None:
    """fp32 weights in the place of those that the model computed with, under all of their names."""
    for group, entries in zip(groups, stepper.groups, strict=True):
        for entry, master in zip(entries, group.masters, strict=bool(group.masters)):
            if entry.key in stored and master.shape == entry.shape:
                old = stored[entry.key]
                stored |= {name: master for name, tensor in stored.items() if tensor is old}
