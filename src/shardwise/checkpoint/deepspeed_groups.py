"""The optimizer in a folder of DeepSpeed: what it has of each parameter, out of what each rank has of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from shardwise.checkpoint.deepspeed_folder import Folder, read_universal
from shardwise.checkpoint.stored_tensor import Segment, Stored

Piece = tuple[int, int, int]
"""Rank, first element in that rank's flat group, and how many."""


@dataclass
class OptimizerGroup:
    """One group of the optimizer.

    Args:
        params: names; empty where the folder does not say them (stage 0).
        values: hyperparameters; empty where the folder does not say them.
        state: by number or name of the parameter, what the optimizer has of it: tensors, numbers, ``None``.
        masters: fp32 weights by the same.
    """

    params: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    state: list[dict[str, Any]] = field(default_factory=list)
    masters: list[Stored] = field(default_factory=list)


# --- stages 1 to 3 -----------------------------------------------------------------------------------
def flat_groups(folder: Folder) -> list[OptimizerGroup]:
    """Stages 1 and 2: each group's parameters lie end to end, and ranks hold equal slices of that."""
    paddings = folder.optims[0].get("param_alignment_paddings") or []
    masters = [_tensors(folder, optim, "single_partition_of_fp32_groups") for optim in folder.optims]
    bases = [_base(folder, optim.get("base_optimizer_state")) for optim in folder.optims]
    out: list[OptimizerGroup] = []
    for g, members in enumerate(folder.groups):
        if any(len(rank) <= g for rank in masters):
            raise folder.damaged("the optimizer has fewer groups than the model")
        sizes = [rank[g].numel for rank in masters]
        group = OptimizerGroup(values=_values(bases[0][1], g))
        at = 0
        for i, (name, shape) in enumerate(members):
            pieces = list(_cut(sizes, at, prod(shape)))
            _add(folder, group, name, shape, pieces, [r[g] for r in masters], [base.get(g, {}) for base, _ in bases])
            at += prod(shape) + (int(paddings[g][i]) if g < len(paddings) else 0)
        out.append(group)
    return out


def _base(folder: Folder, found: Any) -> tuple[dict[int, Mapping[str, Any]], list[Mapping[str, Any]]]:
    """An optimizer's state by number, and its groups. "Elastic" checkpoints have a list of states alone."""
    if isinstance(found, list):
        return {i: state for i, state in enumerate(found) if isinstance(state, Mapping)}, []
    if not isinstance(found, Mapping) or not isinstance(found.get("state"), Mapping):
        raise folder.damaged("there is no state of the optimizer in it")
    state = {int(k): v for k, v in found["state"].items() if isinstance(v, Mapping)}
    return state, [group for group in found.get("param_groups") or [] if isinstance(group, Mapping)]


def _values(groups: Sequence[Mapping[str, Any]], index: int) -> dict[str, Any]:
    return {k: v for k, v in groups[index].items() if k != "params"} if index < len(groups) else {}


def partitioned_groups(folder: Folder) -> list[OptimizerGroup]:
    """Stage 3: each parameter is padded and cut into equal slices, one per rank. They lie end to end in sub-groups."""
    masters = [_tensors(folder, optim, "fp32_flat_groups") for optim in folder.optims]
    bases = [_base(folder, optim.get("optimizer_state_dict")) for optim in folder.optims]
    params = [[int(i) for i in group.get("params") or ()] for group in bases[0][1]]
    groups = [OptimizerGroup(values=_values(bases[0][1], g)) for g in range(len(params))]
    ranks = len(folder.optims)
    for s, members in enumerate(folder.groups):
        owner = next((g for g, inside in enumerate(params) if s in inside), None)
        if owner is None or any(len(rank) <= s for rank in masters):
            raise folder.damaged("the optimizer has fewer groups than the model")
        at = 0
        for name, shape in members:
            each = -(-prod(shape) // ranks)
            pieces = [(r, at, each) for r in range(ranks)]
            states = [base.get(s, {}) for base, _ in bases]
            _add(folder, groups[owner], name, shape, pieces, [r[s] for r in masters], states)
            at += each
    return groups


def _add(
    folder: Folder,
    group: OptimizerGroup,
    name: str,
    shape: tuple[int, ...],
    pieces: Sequence[Piece],
    masters: Sequence[Stored],
    states: Sequence[Mapping[str, Any]],
) -> None:
    """One parameter, of which every rank's flat tensors have some pieces."""
    group.params.append(name)
    group.masters.append(_of_ranks(folder, name, shape, pieces, masters))
    state: dict[str, Any] = {}
    for key, value in states[0].items():
        if not isinstance(value, Stored) or not value.shape:
            state[key] = value
            continue
        found = [other.get(key) for other in states]
        if all(isinstance(t, Stored) and t.numel >= m.numel for t, m in zip(found, masters, strict=True)):
            state[key] = _of_ranks(folder, f"{key} of {name}", shape, pieces, found)
    group.state.append(state)


def _of_ranks(
    folder: Folder, name: str, shape: tuple[int, ...], pieces: Sequence[Piece], ranks: Sequence[Any]
) -> Stored:
    if not pieces:  # a parameter without elements
        return Stored(ranks[0].dtype, shape)
    return joined(folder, name, shape, [(ranks[rank], start, length) for rank, start, length in pieces])


def _tensors(folder: Folder, optim: Mapping[str, Any], key: str) -> list[Stored]:
    found = optim.get(key)
    if not isinstance(found, list) or not all(isinstance(t, Stored) and t.segments for t in found):
        raise folder.damaged(f"the optimizer's file has no '{key}'")
    return found


def joined(folder: Folder, name: str, shape: tuple[int, ...], pieces: Sequence[tuple[Stored, int, int]]) -> Stored:
    """One tensor of slices ``(stored, start, length)``, one behind the other. What is too much is padding."""
    segments: list[Segment] = []
    at, numel = 0, prod(shape)
    for stored, start, length in pieces:
        length = min(length, numel - at, stored.numel - start)
        if length > 0:
            first = stored.segments[0]
            segments.append(replace(first, start=at, length=length, skip=first.skip + start))
            at += length
    if at != numel or any(segment.layout for segment in segments):
        raise folder.damaged(f"parts of '{name}' are missing")
    return Stored(pieces[0][0].dtype, shape, tuple(segments))


def _cut(sizes: Sequence[int], at: int, length: int) -> Iterator[Piece]:
    """Where elements ``at:at + length`` are, of slices of these sizes that lie end to end."""
    begin = 0
    for rank, size in enumerate(sizes):
        lo, hi = max(at, begin), min(at + length, begin + size)
        if lo < hi:
            yield rank, lo - begin, hi - lo
        begin += size


# --- universal ones, and stage 0 ---------------------------------------------------------------------
def universal_groups(folder: Folder) -> list[OptimizerGroup]:
    """A folder per parameter, with a file per tensor."""
    common = folder.universal or {}
    inner = common.get("optimizer_state_dict")
    inner = inner if isinstance(inner, Mapping) else {}
    saved = common.get("param_groups") or inner.get("param_groups") or []
    subgroups = [[int(i) for i in group.get("params") or ()] for group in saved]
    states = inner.get("state")
    steps = {int(k): v.get("step") for k, v in states.items()} if isinstance(states, Mapping) else {}
    groups = [OptimizerGroup(values=_values(saved, g)) for g in range(len(saved))]
    for s, members in enumerate(folder.groups):
        owner = next((g for g, inside in enumerate(subgroups) if s in inside), s)
        if owner >= len(groups):
            raise folder.damaged("the optimizer has fewer groups than the model")
        for name, shape in members:
            found = read_universal(folder, name)
            tensors = {key: _shaped(folder, name, t, shape) for key, t in found.items() if key != "step"}
            step = found.get("step", steps.get(s, common.get("base_optimizer_state_step")))
            groups[owner].params.append(name)
            groups[owner].masters.append(tensors.pop("fp32"))
            groups[owner].state.append({**({} if step is None else {"step": step}), **tensors})
    return groups


def _shaped(folder: Folder, name: str, found: Any, shape: tuple[int, ...]) -> Any:
    if not isinstance(found, Stored) or not found.shape:
        return found
    if found.numel != prod(shape):
        raise folder.damaged(f"'{name}' has {found.numel} elements in one of its files, not {prod(shape)}")
    return replace(found, shape=shape)


def whole_groups(folder: Folder, optimizer: Mapping[str, Any]) -> tuple[list[OptimizerGroup] | None, bool]:
    """Stage 0: what the optimizer's own ``state_dict()`` gave, where parameters have numbers and no names.

    Names are only told where there is no doubt: one group that has all of the model's tensors in its order.
    """
    inner = optimizer.get("optimizer_state_dict", optimizer)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("state"), Mapping):
        return None, False
    state, saved = _base(folder, inner)
    flat = "fp32_groups_flat" in optimizer
    masters = optimizer.get("fp32_groups_flat" if flat else "fp32_groups") or []
    groups: list[OptimizerGroup] = []
    for g, group in enumerate(saved):
        one = OptimizerGroup(values=_values(saved, g))
        one.state = [dict(state.get(int(i), {})) for i in group.get("params") or ()]
        if g < len(masters):
            one.masters = [masters[g]] if flat else list(masters[g])
        if not all(isinstance(t, Stored) for t in one.masters):
            raise folder.damaged("the optimizer's weights are not tensors")
        groups.append(one)
    if len(groups) == 1 and not flat:
        _name(folder, groups[0])
    return groups, flat


def _name(folder: Folder, group: OptimizerGroup) -> None:
    buffers = {str(name) for name in folder.first.get("buffer_names") or ()}
    first: dict[int, tuple[str, Stored]] = {}
    for name, stored in folder.first["module"].items():
        if isinstance(stored, Stored) and str(name) not in buffers:
            first.setdefault(id(stored), (str(name), stored))
    found = list(first.values())
    mine = [next((t.shape for t in state.values() if isinstance(t, Stored) and t.shape), None) for state in group.state]
    if len(found) == len(mine) and all(s in (None, t.shape) for s, (_, t) in zip(mine, found, strict=True)):
        group.params = [name for name, _ in found]
        if not group.masters:
            group.masters = [stored for _, stored in found]
