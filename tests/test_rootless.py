"""Models whose root has no forward: a script calls the parts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
import shardwise.deepspeed as deepspeed
from models import PRESETS, Block, assert_close, assert_same, batch, rank, whole, world
from ranks import run
from shardwise.engine.hooks import engine_of

STEPS = 3


class Parts(nn.Module):
    """An embedding, blocks, a part without a forward of its own, and a parameter that nothing runs for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 12)
        self.body = nn.Sequential(*[Block(12) for _ in range(3)])
        self.ends = nn.ModuleDict({"norm": nn.LayerNorm(12), "head": nn.Linear(12, 31)})
        self.spare = nn.Parameter(torch.ones(5))

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.body(self.embed(ids[:, :-1]))
        return F.cross_entropy(self.ends["head"](self.ends["norm"](x)).flatten(0, 1), ids[:, 1:].flatten())


def make() -> Parts:
    torch.manual_seed(0)
    return Parts()


def train(model, optimizer, steps=STEPS):
    for step in range(steps):
        model.loss(batch(step, rank())).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(strategy, units=None):
    model = make()
    shardwise.fully_shard(model, strategy=strategy, units=units)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    with torch.no_grad():
        value = model.loss(batch(9, 0)).item()
    engine = engine_of(model)
    assert len(engine.forward.training.now) <= len(engine.units)  # a pass ends where a part comes again
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert other.loss(batch(9, 0)).item() == value
    return value, whole(model)


def alone(size):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        for r in range(size):
            (model.loss(batch(step, r)) / size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.loss(batch(9, 0)).item(), whole(model)


@pytest.mark.parametrize("size", [1, 2])
def test_parts_train_like_one_process(size):
    value, weights = alone(size)
    first = None
    for strategy in [*PRESETS, "zero3,offload_optimizer=cpu"]:
        for found in run(size, trained, strategy):
            assert found[0] == pytest.approx(value, rel=1e-5)
            assert_close(found[1], weights)
            first = first or found
            assert found[0] == first[0]
            assert_same(found[1], first[1])
    assert_close(run(2, trained, "zero3", Block)[0][1], alone(2)[1])


def by_engine(stage):
    engine, *_ = deepspeed.initialize(
        model=make(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        },
    )
    for step in range(STEPS):
        engine.backward(engine.loss(batch(step, rank())))
        engine.step()
    with pytest.raises(NotImplementedError, match="forward"):
        engine(batch(0, 0))
    assert world() == 2
    return whole(engine.module)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_parts_of_an_engines_model(stage):
    assert_close(run(2, by_engine, stage)[0], alone(2)[1])
