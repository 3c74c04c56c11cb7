"""``offload_overlap``: updates take place during the next forward, and nothing can tell but a clock."""

from __future__ import annotations

import copy
import gc
import os
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.optim import lr_scheduler

import shardwise
from models import adamw, assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.engine import deferred_update
from shardwise.engine.build import require_engine
from shardwise.errors import OffloadError, UpdateFailed
from test_offload import at, separate_memory

DISK = "offload_optimizer=nvme"
BOTH = "offload_params=nvme,offload_optimizer=nvme"
ALL = "offload_params=cpu,offload_grads=cpu,offload_optimizer=cpu"
LATER = ["ddp", "zero3", "hsdp,shard_size=1", "zero1"]


def pending(model: Any) -> list[int]:
    return [u.index for u in require_engine(model).units if u.updates]


def looks(strategy: str) -> list[Any]:
    """Whatever may be done between a step and the next forward, each at once after a step."""
    model = shardwise.fully_shard(make(), strategy=strategy)
    opt = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, fused=True)
    schedule = lr_scheduler.LambdaLR(opt, lambda k: 0.0 if k == 3 else 1 / (k + 1))
    seen: list[Any] = []

    def step(k: int, zero: bool | None = True) -> None:
        loss = loss_of(model, batch(k, rank()))
        loss.backward()
        seen.append((loss.item(), shardwise.clip_grad_norm_(model, 0.5).item()))
        opt.step()
        schedule.step()  # settings change, gradients go: the update is that of the step
        if zero is not None:
            opt.zero_grad(set_to_none=zero)

    for k in range(4):
        step(k)
    step(4, zero=False)
    seen.append(whole(model))
    step(5)
    with shardwise.optimizer_state(opt) as state:
        seen.append(sum(float(s["exp_avg"].double().sum()) for s in state.values() if s["exp_avg"].numel()))
    step(6)
    seen.append({k: float(v["exp_avg_sq"].double().sum()) for k, v in opt.state_dict()["state"].items()})
    step(7, zero=None)
    shardwise.clip_grad_norm_(model, 0.01)  # of gradients that an update still needs
    opt.zero_grad()
    step(8, zero=None)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.0)
    opt.zero_grad()
    step(9)
    with shardwise.gathered(model, write=True), torch.no_grad():
        model.head.weight.mul_(0.9)
    step(10)
    opt.load_state_dict(opt.state_dict())
    step(11)
    model.load_state_dict({k: v * 0.99 for k, v in model.state_dict().items()})
    step(12)
    opt.step()  # without gradients: nothing
    with torch.inference_mode():
        seen.append(model(batch(99, 0)[:, :-1]).sum().item())
    step(13)
    seen.append(whole(model))
    return seen


def same_looks(path: str, strategies: list[str], homes: list[str]) -> None:
    for strategy in strategies:
        for home in homes:
            text = at(strategy, home, path)
            for mine, plain in zip(looks(text), looks(text + ",offload_overlap=false"), strict=True):
                if isinstance(plain, dict) and plain and isinstance(next(iter(plain.values())), torch.Tensor):
                    assert_same(mine, plain)
                else:
                    assert mine == plain, (strategy, home)
    gc.collect()


@pytest.mark.parametrize("world", [1, 2])
def test_whatever_is_looked_at_is_as_if_it_had_taken_place(world, tmp_path):
    run(world, same_looks, str(tmp_path), LATER if world == 2 else LATER[:2], [DISK, BOTH])
    assert os.listdir(tmp_path) == []


def separately(path: str) -> None:
    with separate_memory():
        same_looks(path, ["ddp", "zero3,param_dtype=bf16"], [ALL, DISK])


def test_over_the_link(tmp_path):
    run(2, separately, str(tmp_path))


def order(path: str, strategy: str) -> tuple[list[int], list[list[int]], list[int]]:
    """Which units' updates nobody has waited for: after the step, when each block computes, after the forward."""
    model = shardwise.fully_shard(make(layers=5), strategy=at(strategy, DISK, path))
    opt = adamw(model.parameters())
    for k in range(3):
        loss_of(model, batch(k, rank())).backward()
        shardwise.clip_grad_norm_(model, 0.1)
        opt.step()
        opt.zero_grad()
        after_step = pending(model)
    during: list[list[int]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: during.append(pending(model)))
    loss_of(model, batch(5, rank()))
    return after_step, during, pending(model)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_the_forward_waits_unit_by_unit(strategy, tmp_path):
    for after_step, during, at_last in run(2, order, str(tmp_path), strategy):
        assert len(after_step) == 6 and at_last == []
        assert [len(left) for left in during] == [4, 3, 2, 1, 0] or [len(left) for left in during] == [5, 4, 3, 2, 1]


def one_rank_only(path: str) -> list[int]:
    """Values that are whole are there after a step, whatever the other ranks do."""
    model = shardwise.fully_shard(make(), strategy=at("zero2", DISK, path))
    opt = adamw(model.parameters())
    for k in range(2):
        loss_of(model, batch(k, rank())).backward()
        opt.step()
        opt.zero_grad()
    left = pending(model)
    if rank() == 0:
        with torch.no_grad():
            model(batch(7, 0)[:, :-1])
    dist.barrier()
    return left


def test_one_rank_may_evaluate_where_values_are_whole(tmp_path):
    assert run(2, one_rank_only, str(tmp_path)) == [[], []]


def gradients_like_any_other(path: str) -> None:
    """On one rank, and under ddp, whole gradients are here: every operation works on them."""
    models = [shardwise.fully_shard(make(), strategy=s) for s in ("ddp", at("ddp", DISK, path))]
    opts = [adamw(m.parameters()) for m in models]
    for k in range(3):
        for model, opt in zip(models, opts, strict=True):
            loss_of(model, batch(k, rank())).backward()
            opt.step()
        a, b = (m.head.weight for m in models)
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad.abs().sum(), b.grad.abs().sum())
        assert torch.equal(a.grad.norm(), b.grad.norm())
        assert torch.equal(a.grad[2:5] + 1, b.grad[2:5] + 1)
        for model, opt in zip(models, opts, strict=True):
            p = model.head.weight
            p.grad += 0.5
            p.grad.mul_(2)
            model.norm.weight.grad.copy_(torch.full((13,), 0.25))
            opt.step()
            opt.zero_grad()
        assert torch.equal(a, b), "values are read as they will be"
    assert_same(whole(models[1]), whole(models[0]))


@pytest.mark.parametrize("world", [1, 2])
def test_whole_gradients_are_like_any_others(world, tmp_path):
    run(world, gradients_like_any_other, str(tmp_path))


class Own(torch.optim.SGD):
    """Not torch's own: nobody knows what else its step does."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure)


def test_optimizers_of_others_are_stepped_at_once(tmp_path):
    model = shardwise.fully_shard(make(), strategy=at("zero3", DISK, str(tmp_path)))
    opt = Own(model.parameters(), lr=0.1, momentum=0.9)
    for k in range(3):
        loss_of(model, batch(k, 0)).backward()
        opt.step()
        opt.zero_grad()
        assert pending(model) == []


def parted(path: str, homes: str) -> tuple[list[int], dict[str, torch.Tensor]]:
    """One parameter of each block belongs to an optimizer that is stepped at once: a rank may hold no other."""
    model = make(layers=4, tied=True)
    shardwise.fully_shard(model, strategy=at("zero3,layout=tensor", homes, path))
    large = [block.up.weight for block in model.blocks]
    known = {id(p) for p in large}
    opts = [Own(large, lr=0.1, momentum=0.9), adamw([p for p in model.parameters() if id(p) not in known])]
    waiting: list[int] = []
    for k in range(4):
        loss_of(model, batch(k, rank())).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        waiting = pending(model)
    return waiting, whole(model)


def ranks_differ(path: str) -> list[int]:
    waiting, weights = parted(path, BOTH)
    assert_same(weights, parted(path, "device")[1])
    return waiting


def test_ranks_of_which_only_some_have_an_update_gather_in_one_order(tmp_path):
    assert len(set(map(tuple, run(4, ranks_differ, str(tmp_path))))) > 1, "all of them have the same ones"


def test_what_fails_there_is_said_in_the_forward(tmp_path, monkeypatch):
    model = shardwise.fully_shard(make(), strategy=at("zero3", DISK, str(tmp_path)))
    opt = adamw(model.parameters())
    for k in range(2):
        loss_of(model, batch(k, 0)).backward()
        opt.step()
        opt.zero_grad()
    assert pending(model)
    model(batch(3, 0)[:, :-1])
    loss_of(model, batch(2, 0)).backward()
    store = model.head.weight._shardwise_unit.home.store

    def fails(*_: Any) -> Any:
        raise OffloadError("the disk is gone", where="here")

    monkeypatch.setattr(store, "read", fails)
    opt.step()
    for _ in range(2):
        with pytest.raises(UpdateFailed, match="the disk is gone"):
            model(batch(3, 0)[:, :-1])


def first_step_beside(path: str) -> list[Any]:
    """Of a copy, whose home is the original's, while the last updates of that take long."""
    model = shardwise.fully_shard(make(), strategy=at("zero3", BOTH, path))
    other = copy.deepcopy(model)
    update = deferred_update.update
    with mock.patch.object(deferred_update, "update", lambda *args: (time.sleep(0.1), update(*args))[1]):
        for m, count in ((model, 2), (other, 1)):
            opt = adamw(m.parameters())
            for k in range(count):
                loss_of(m, batch(k, 0)).backward()
                opt.step()
                opt.zero_grad()
        return [whole(model), whole(other)]


def test_a_step_that_cannot_wait_has_buffers_while_another_models_updates_take_place(tmp_path):
    (found,) = run(1, first_step_beside, str(tmp_path))
    alone = make()
    opt = adamw(alone.parameters())
    for k, expected in enumerate(reversed(found)):
        loss_of(alone, batch(k, 0)).backward()
        opt.step()
        opt.zero_grad()
        assert_close(expected, whole(alone), 2e-5)
