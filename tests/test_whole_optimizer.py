"""Whole state dicts of optimizers: what plain torch would have, and back into any strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardwise
from models import PRESETS, adamw, assert_close, assert_same, batch, loss_of, make, rank, step, whole
from ranks import run
from shardwise import checkpoint
from shardwise.errors import CheckpointError
from slowly import slow


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own, in another order than the model's."""
    blocks = list(model.blocks.parameters())
    known = {id(p) for p in blocks}
    return [{"params": blocks, "lr": 5e-3}, {"params": [p for p in model.parameters() if id(p) not in known]}]


def plain_steps(kind: Any, start: int, stop: int, state: Any = None) -> tuple[Any, Any]:
    """One process on the batches of two ranks."""
    model = make()
    optimizer = kind(groups_of(model))
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    for index in range(start, stop):
        loss_of(model, torch.cat([batch(index, r) for r in range(2)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model), optimizer.state_dict()


def sharded_steps(strategy: str, kind: Any, start: int, stop: int, state: Any = None) -> tuple[Any, Any]:
    model = shardwise.fully_shard(make(), strategy=strategy)
    optimizer = kind(groups_of(model))
    if state is not None:
        model.load_state_dict(state[0])
        checkpoint.load_full_optimizer_state(optimizer, state[1])
    for index in range(start, stop):
        step(model, optimizer, index)
    return whole(model), checkpoint.full_optimizer_state(optimizer, rank0_only=True)


def assert_states(mine: Any, plain: Any, same: bool = False) -> None:
    assert mine["param_groups"] == plain["param_groups"]
    assert mine["state"].keys() == plain["state"].keys()
    for number, values in plain["state"].items():
        (assert_same if same else assert_close)(mine["state"][number], values)


@pytest.mark.parametrize("kind", [adamw, slow(momentum)])
def test_whole_state_is_that_of_a_plain_optimizer_and_goes_back(kind):
    middle, end = plain_steps(kind, 0, 3), plain_steps(kind, 0, 5)
    first = None
    for strategy in [*PRESETS, "zero3,layout=tensor"]:
        (weights, state), (_, nothing) = run(2, sharded_steps, strategy, kind, 0, 3)
        assert nothing == {}
        assert_states(state, middle[1])
        (again, last), _ = run(2, sharded_steps, strategy, kind, 3, 5, (weights, state))
        (through, straight), _ = run(2, sharded_steps, strategy, kind, 0, 5)
        assert_same(again, through)
        assert_states(last, straight, same=True)
        (onward, _), _ = run(2, sharded_steps, strategy, kind, 3, 5, middle)
        assert_close(onward, end[0])
        back, _ = plain_steps(kind, 3, 5, (weights, state))
        assert_close(back, end[0])
        if strategy in PRESETS:
            first = first or state
            assert_states(state, first, same=True)


def other_homes(folder: str) -> None:
    for keys in ("offload_optimizer=nvme", "param_dtype=bf16"):
        strategy = f"zero2,{keys},nvme_path={folder}" if "nvme" in keys else f"zero2,{keys}"
        middle = sharded_steps(strategy, adamw, 0, 3)
        state = [middle if rank() == 0 else None]
        torch.distributed.broadcast_object_list(state)
        again, _ = sharded_steps(strategy, adamw, 3, 5, state[0])
        assert_same(again, sharded_steps(strategy, adamw, 0, 5)[0])


def test_state_on_a_disk_and_beside_master_values(tmp_path):
    run(2, other_homes, str(tmp_path))


def unfitting() -> None:
    model = shardwise.fully_shard(make(), strategy="zero3")
    state = checkpoint.full_optimizer_state(adamw(groups_of(model)))
    with pytest.raises(CheckpointError, match="build the optimizer as it was"):
        checkpoint.load_full_optimizer_state(adamw(model.parameters()), state)


def test_other_groups_are_an_error():
    run(2, unfitting)


def of_another_class(folder: str) -> None:
    model = shardwise.fully_shard(make(), strategy="zero3")
    optimizer = adamw(model.parameters())
    step(model, optimizer, 0)
    checkpoint.save(folder, models=[model], optimizers=[optimizer], progress=False)
    other = shardwise.fully_shard(make(), strategy="zero2")
    steps = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    step(other, steps, 0)
    before = checkpoint.full_optimizer_state(steps)
    with pytest.raises(CheckpointError, match="the settings have betas, and those of SGD are momentum"):
        checkpoint.load_full_optimizer_state(steps, checkpoint.full_optimizer_state(optimizer))
    with pytest.raises(CheckpointError, match="the settings have betas, and those of SGD are momentum"):
        checkpoint.load(folder, models=[other], optimizers=[steps], progress=False)
    loaded = checkpoint.load(folder, models=[other], optimizers=[steps], strict=False, progress=False)
    assert len(loaded.differences) == 1 and "SGD" in loaded.differences[0]
    assert_states(checkpoint.full_optimizer_state(steps), before, same=True)
    assert_same(whole(other), whole(model))


def test_state_of_another_class_is_an_error(tmp_path):
    run(2, of_another_class, str(tmp_path / "saved"))
