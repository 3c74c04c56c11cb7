"""``copy.deepcopy`` of a sharded model: a second one, sharded alike, that lives a life of its own."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import shardwise
from models import PRESETS, adamw, assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from scenario_models import D, Lora, MixedDtypes
from scenarios import rows_of_floats
from shardwise.engine.build import engines
from shardwise.engine.hooks import engine_of
from shardwise.errors import ReleasedParameterError, ShardwiseError, UnitError
from slowly import slow, slow_unless

GROUPS = ("hsdp,shard_size=2", 4)
SIZES = [(preset, size) for preset in PRESETS for size in (1, 2)]
DISK = "offload_params=nvme,offload_optimizer=nvme"
KEYS = ["param_dtype=bf16", "reduce_dtype=bf16", "layout=tensor", "activation_checkpointing=true"]
HOMES = ["offload_optimizer=nvme", DISK, f"{DISK},param_dtype=bf16", f"{DISK},activation_checkpointing=true"]


def sharded(strategy: str, **kw: Any) -> Any:
    return shardwise.fully_shard(make(**kw), strategy=strategy)


def some_steps(model: Any, optimizer: Any, first: int = 0, count: int = 2) -> list[float]:
    losses = []
    for step in range(first, first + count):
        loss = loss_of(model, batch(step, rank()))
        loss.backward()
        losses += [loss.item(), shardwise.clip_grad_norm_(model, 0.5).item()]
        optimizer.step()
        optimizer.zero_grad()
    return losses


# --- two models -------------------------------------------------------------------------------------------
def trains_like_the_original(path: str, strategies: list[str]) -> None:
    """Side by side, step by step: the same bits. Then one goes on alone."""
    for strategy in strategies:
        model = sharded(f"{strategy},nvme_path={path}", tied=True)
        some_steps(model, adamw(model.parameters()))
        before = whole(model)
        twin = copy.deepcopy(model)
        assert_same(whole(twin), before)
        assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert twin.head.weight is twin.embed.weight, "what is tied stays tied"
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        optimizers = [adamw(m.parameters()) for m in (model, twin)]
        for step in range(3):
            losses = [some_steps(m, o, step, 1) for m, o in zip((model, twin), optimizers, strict=True)]
            assert losses[0] == losses[1], strategy
        assert_same(whole(twin), whole(model))
        after = whole(model)
        some_steps(twin, optimizers[1], 5, 1)
        assert_same(whole(model), after)
        assert not torch.equal(whole(twin)["head.weight"], after["head.weight"])


@pytest.mark.parametrize(
    ("strategy", "size"), [*(slow_unless(s == 1 or p in ("ddp", "zero3"), p, s) for p, s in SIZES), GROUPS]
)
def test_a_copy_trains_like_the_original(strategy, size, tmp_path):
    keys = KEYS if size == 2 else []
    run(size, trains_like_the_original, str(tmp_path), [strategy, *(f"{strategy},{key}" for key in keys)])


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 1), slow("zero1", 2), ("zero3", 2)])
def test_a_copy_has_homes_of_its_own(strategy, size, tmp_path):
    run(size, trains_like_the_original, str(tmp_path), [f"{strategy},{home}" for home in HOMES])


def of_other_models(strategy: str) -> None:
    for build in (Lora, MixedDtypes):
        model = shardwise.fully_shard(build(), strategy=strategy)
        twin = copy.deepcopy(model)
        for m in (model, twin):
            opt = adamw([p for p in m.parameters() if p.requires_grad])
            for step in range(2):
                m(rows_of_floats(step, rank())).square().mean().backward()
                opt.step()
                opt.zero_grad()
        assert_same(whole(twin), whole(model))


@pytest.mark.parametrize("strategy", PRESETS)
def test_copies_of_models_with_frozen_parts_and_several_dtypes(strategy):
    run(2, of_other_models, strategy)


def in_the_middle(strategy: str) -> None:
    """A copy in the middle of a step: after a forward, after a backward, with an update under way."""
    model = sharded(strategy)
    opt = adamw(model.parameters())
    loss = loss_of(model, batch(0, rank()))
    twins = [copy.deepcopy(model)]
    loss.backward()
    twins.append(copy.deepcopy(model))
    values = whole(model)
    assert all(p.grad is None for twin in twins for p in twin.parameters()), "gradients are the original's"
    opt.step()
    twins.append(copy.deepcopy(model))
    opt.zero_grad()
    for twin in twins[:2]:
        assert_same(whole(twin), values)
    assert_same(whole(twins[2]), whole(model))
    for twin in twins:
        some_steps(twin, adamw(twin.parameters()))
    plain = sharded(strategy)
    one, other = adamw(plain.parameters()), adamw(model.parameters())
    loss_of(plain, batch(0, rank())).backward()
    one.step()
    one.zero_grad()
    del one
    again = adamw(plain.parameters())
    assert some_steps(model, other) == some_steps(plain, again)
    assert_same(whole(model), whole(plain))


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,param_dtype=bf16"])
def test_a_copy_may_be_taken_at_any_time(strategy):
    run(2, in_the_middle, strategy)


def again_and_again(strategy: str) -> None:
    model = sharded(strategy)
    twin = copy.deepcopy(copy.deepcopy(model))
    other = copy.deepcopy(twin)
    models = (model, twin, other)
    losses = [some_steps(m, adamw(m.parameters())) for m in models]
    assert losses[0] == losses[1] == losses[2]
    for m in models[1:]:
        assert_same(whole(m), whole(model))


@pytest.mark.parametrize("strategy", PRESETS)
def test_copies_of_copies(strategy):
    run(2, again_and_again, strategy)


def only_on_one_rank(strategy: str) -> None:
    """Nothing is sent, so a rank may copy alone; models that are sharded later still agree."""
    model = sharded(strategy)
    sent = shardwise.stats().bytes_sent
    twin = copy.deepcopy(model) if rank() == 0 else None
    assert shardwise.stats().bytes_sent == sent
    later = sharded(strategy)
    for m in (model, later):
        some_steps(m, adamw(m.parameters()))
    assert_same(whole(model), whole(later))
    if twin is not None and strategy in ("ddp", "zero1"):
        with torch.no_grad():
            twin.eval()(batch(0, 0)[:, :-1])


@pytest.mark.parametrize("strategy", PRESETS)
def test_one_rank_may_copy_alone(strategy):
    run(2, only_on_one_rank, strategy)


# --- what copies are for --------------------------------------------------------------------------------------
def moving_average(strategy: str) -> None:
    """torch's AveragedModel: an exponential average, and a mean of all steps; plain models say what is right."""
    model, oracle = sharded(strategy), make()
    kinds: list[dict[str, Any]] = [{"multi_avg_fn": get_ema_multi_avg_fn(0.75)}, {}]
    means, plain = [[AveragedModel(m, **kw) for kw in kinds] for m in (model, oracle)]
    opt, ref = adamw(model.parameters()), adamw(oracle.parameters())
    for step in range(3):
        loss_of(model, batch(step, rank())).backward()
        loss_of(oracle, torch.cat([batch(step, r) for r in range(world())])).backward()
        for o in (opt, ref):
            o.step()
            o.zero_grad()
        for mean, other in zip(means, plain, strict=True):
            if "zero3" in strategy or "hsdp" in strategy:
                with shardwise.gathered(model), shardwise.gathered(mean, write=True):
                    mean.update_parameters(model)
            else:
                mean.update_parameters(model)
            other.update_parameters(oracle)
    for mean, other in zip(means, plain, strict=True):
        assert_close(whole(mean), whole(other), 1e-4)
        rows = batch(9, 0)
        with torch.no_grad():
            torch.testing.assert_close(loss_of(mean, rows), loss_of(other, rows), rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole(means[0])["module.head.weight"], whole(model)["head.weight"])


@pytest.mark.parametrize(("strategy", "size"), [*SIZES, GROUPS])
def test_moving_averages(strategy, size):
    run(size, moving_average, strategy)


def target_network(strategy: str) -> None:
    """A frozen copy gives the targets, and is brought up to date now and then, as in reinforcement learning."""
    model, oracle = sharded(strategy), make()
    target, plain = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(oracle).requires_grad_(False)
    opt, ref = adamw(model.parameters()), adamw(oracle.parameters())
    for step in range(4):
        for m, t, o, rows in (
            (model, target, opt, batch(step, rank())),
            (oracle, plain, ref, torch.cat([batch(step, r) for r in range(world())])),
        ):
            ids = rows[:, :-1]
            with torch.no_grad():
                aim = t(ids).roll(1, -1)
            (m(ids) - aim).square().mean().backward()
            assert all(p.grad is None for p in t.parameters())
            o.step()
            o.zero_grad()
        if step == 1:
            target.load_state_dict(model.state_dict())
            plain.load_state_dict(oracle.state_dict())
    assert_close(whole(target), whole(plain), 1e-4)
    assert_close(whole(model), whole(oracle), 1e-3)


@pytest.mark.parametrize(("strategy", "size"), SIZES)
def test_a_frozen_target_network(strategy, size):
    run(size, target_network, strategy)


class Bn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def buffers(strategy: str) -> None:
    model = shardwise.fully_shard(Bn(), strategy=strategy)
    model(rows_of_floats(0, rank()))
    mean = AveragedModel(model, use_buffers=False)
    assert torch.equal(mean.module.net[1].running_mean, model.net[1].running_mean)
    model(rows_of_floats(1, rank()))
    assert not torch.equal(mean.module.net[1].running_mean, model.net[1].running_mean)
    update_bn([rows_of_floats(step, rank()) for step in range(3)], mean)
    assert mean.module.net[1].num_batches_tracked == 3 and model.net[1].num_batches_tracked == 2


@pytest.mark.parametrize("strategy", PRESETS)
def test_a_copy_has_buffers_of_its_own(strategy):
    run(2, buffers, strategy)


# --- what is refused -----------------------------------------------------------------------------------------
def refused(strategy: str) -> None:
    model = sharded(strategy)
    with pytest.raises(ShardwiseError, match="copy the whole model"):
        copy.deepcopy(model.blocks[0])
    with pytest.raises(ShardwiseError, match="copy the whole model"):
        copy.deepcopy(model.blocks)
    with pytest.raises(ShardwiseError, match=r"pickl(.|\n)*save model\.state_dict\(\) instead"):
        pickle.dumps(model)
    with pytest.raises(ShardwiseError, match="copied without its model"):
        copy.deepcopy(engine_of(model))
    if strategy == "zero3":
        with pytest.raises(ReleasedParameterError, match="copy the whole model"):
            copy.deepcopy(model.head.weight)
        with shardwise.gathered(model):
            assert torch.equal(copy.deepcopy(model.head.weight), make().head.weight)
    twin = copy.deepcopy(model)  # an attempt has left nothing behind
    assert_same(whole(twin), whole(make()))


@pytest.mark.parametrize("strategy", PRESETS)
def test_parts_and_pickles_are_refused(strategy):
    run(2, refused, strategy)


class LeavesOut(nn.Module):
    """Its copies have no second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))

    def __deepcopy__(self, memo: Any) -> Any:
        new = memo[id(self)] = LeavesOut()
        new.a = copy.deepcopy(self.a, memo)
        return new


def left_out(strategy: str) -> None:
    model = shardwise.fully_shard(nn.Sequential(nn.Linear(D, D), LeavesOut()), strategy=strategy)
    with pytest.raises(UnitError, match="is not reached by its copy"):
        copy.deepcopy(model)


@pytest.mark.parametrize("strategy", PRESETS)
def test_a_copy_that_leaves_parameters_out_is_refused(strategy):
    run(2, left_out, strategy)


# --- what is left -----------------------------------------------------------------------------------------------
def gone(refs: list[Any], patience: float = 10.0) -> bool:
    """Updates that are under way hold what they update until they have taken place."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        gc.collect()
        if all(ref() is None for ref in refs):
            return True
        time.sleep(0.01)
    return False


def dropped(path: str, strategy: str) -> None:
    """Either may go first, and nothing of it stays: no engine, no bytes on a disk, no model kept by the other."""
    text = f"{strategy},nvme_path={path}"
    for first in (0, 1):
        models = [sharded(text)]
        models.append(copy.deepcopy(models[0]))
        for m in models:
            some_steps(m, adamw(m.parameters()))
        kept = models.pop(1 - first)
        refs = [weakref.ref(models[0]), weakref.ref(engine_of(models[0])), weakref.ref(models[0].head.weight)]
        del m, models
        assert gone(refs), "the original" if first == 0 else "the copy"
        assert engine_of(kept) in set(engines)
        some_steps(kept, adamw(kept.parameters()))
        refs = [weakref.ref(kept), weakref.ref(engine_of(kept))]
        del kept
        assert gone(refs)


@pytest.mark.parametrize("strategy", [*PRESETS, f"zero3,{DISK}"])
def test_models_and_copies_that_are_dropped_are_gone(strategy, tmp_path):
    run(2, dropped, str(tmp_path), strategy)
    assert not list(tmp_path.iterdir())


def memory(strategy: str) -> None:
    model = sharded(strategy)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        some_steps(m, adamw(m.parameters()))
    mine, other = shardwise.stats(model), shardwise.stats(twin)
    assert other.live == mine.live and other.live["parameters"] > 0


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,param_dtype=bf16", "ddp,param_dtype=bf16"])
def test_a_copy_is_counted_by_itself(strategy):
    run(2, memory, strategy)
