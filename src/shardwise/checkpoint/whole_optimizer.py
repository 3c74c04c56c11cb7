"""Whole optimizers: one state dict as torch's own optimizers write it, gathered from all ranks and cut for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from shardwise.checkpoint.coordination import all_gather_bytes
from shardwise.checkpoint.optimizer_state import of_another_kind
from shardwise.comm import World
from shardwise.engine.attachment import place_of, unwrapped
from shardwise.engine.one_state import full_state
from shardwise.engine.optimizer import attach, optimizer_state
from shardwise.engine.optimizer_state import PER_PARAMETER, cut, flush, put_state
from shardwise.errors import CheckpointError
from shardwise.trees import map_tensors


def full_optimizer_state(optimizer: Optimizer, *, rank0_only: bool = False) -> dict[str, Any]:
    """``state_dict()`` of an optimizer as it would be without sharding, with whole tensors on the CPU. Collective.

    What plain PyTorch loads, and :func:`load_full_optimizer_state` under any strategy. A checkpoint needs less memory.

    Args:
        optimizer: of sharded parameters, plain ones, or both.
        rank0_only: the other ranks get an empty dict.

    Raises:
        OptimizerError: state that is neither like its parameter nor a number.

    Cost: two small collectives and a gather of one bucket for each parameter and key. The result takes the whole
    state's memory on the ranks that get it.
    """
    optimizer = unwrapped(optimizer)
    attach(optimizer)
    wanted = not rank0_only or World.current().rank == 0
    params = [p for group in optimizer.param_groups for p in group["params"]]
    mine: list[list[str]] = []
    with optimizer_state(optimizer) as state:
        for p in params:
            place = place_of(p)
            pieces = [p] if place is None else place[0].piece_params[place[1]]
            mine.append(list(next((state[piece] for piece in pieces if piece in state), {})))
    found: dict[int, dict[str, Any]] = {}
    for index, (p, keys) in enumerate(zip(params, _all_keys(mine), strict=True)):
        plain = place_of(p) is None
        whole = dict(optimizer.state.get(p, {})) if plain else {key: full_state(p, key) for key in keys}
        if whole and wanted:
            found[index] = map_tensors(whole, lambda t: t.detach().to("cpu", copy=True))
    if not wanted:
        return {}
    groups, first = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        values = {key: value for key, value in group.items() if key != "params"}
        groups.append({**values, "params": list(range(first, first + count))})
        first += count
    return {"state": found, "param_groups": groups}


def _all_keys(mine: list[list[str]]) -> list[list[str]]:
    """For each parameter the keys that any rank has: one that holds nothing of it knows none."""
    text = "\n".join("\t".join(keys) for keys in mine).encode()
    rows = [bytes(row).decode().split("\n") for row in all_gather_bytes(text)]
    return [
        list(dict.fromkeys(key for row in rows for key in row[index].split("\t") if key)) for index in range(len(mine))
    ]


@torch.no_grad()
def load_full_optimizer_state(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load what a plain optimizer's ``state_dict()`` gave: each rank takes its part. No communication.

    Args:
        optimizer: of sharded parameters, plain ones, or both; with as many groups of as many parameters.
        state_dict: the same on every rank.

    Raises:
        CheckpointError: it has other groups, is of another class of optimizer, or has state of another shape. Nothing
            has changed.
        OptimizerError: the optimizer cannot step on these pieces.
    """
    optimizer = unwrapped(optimizer)
    groups = state_dict["param_groups"]
    sizes, saved = ([len(group["params"]) for group in some] for some in (optimizer.param_groups, groups))
    if sizes != saved:
        raise CheckpointError(
            f"groups of {saved} parameters, and the optimizer has {sizes}",
            where=type(optimizer).__name__,
            fix="build the optimizer as it was when its state was saved",
        )
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        _check(optimizer, group, given, state_dict["state"])
    sharded = attach(optimizer)
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        for p, number in zip(group["params"], given["params"], strict=True):
            state = state_dict["state"].get(number)
            place = place_of(p)
            if place is None:
                optimizer.state.pop(p, None)
                if state is not None:
                    optimizer.state[p] = map_tensors(dict(state), lambda t: t.clone())
                continue
            for piece, values in cut(place, p, state):
                put_state(optimizer, place[0], piece, values)
        group.update({key: value for key, value in given.items() if key != "params"})
    if sharded:
        flush(optimizer)


def _check(optimizer: Optimizer, group: Mapping[str, Any], given: Mapping[str, Any], states: Mapping[Any, Any]) -> None:
    name = type(optimizer).__name__
    if strange := of_another_kind(optimizer, group, given):
        raise CheckpointError(strange, where=name, fix="build the optimizer as it was when its state was saved")
    for p, number in zip(group["params"], given["params"], strict=True):
        place = place_of(p)
        if place is not None and place[0].whole_tensors:
            continue  # what an optimizer keeps for a whole tensor may have any shape
        for key, value in states.get(number, {}).items():
            like_parameter = isinstance(value, torch.Tensor) and value.dim() > 0 and key not in PER_PARAMETER
            if place is not None and like_parameter and value.shape != p.shape:
                raise CheckpointError(
                    f"'{key}' of '{place[0].names[place[1]]}' has shape {tuple(value.shape)}, and the parameter "
                    f"{tuple(p.shape)}",
                    where=name,
                    fix="build the model and the optimizer's groups as they were when its state was saved",
                )
