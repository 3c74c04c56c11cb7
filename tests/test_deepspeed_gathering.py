"""GatheredParameters around one parameter after the other, as weights are sent to another program or set one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import skip_init

import shardwise
from models import make, rank, world
from ranks import run
from shardwise.deepspeed import zero
from shardwise.engine.guard import Guard
from shardwise.engine.hooks import engine_of
from shardwise.errors import WriteLost


def sent(model):
    return {kind: count.bytes_sent for kind, count in shardwise.stats(model).comm.items()}


def loops(strategy):
    model = shardwise.fully_shard(make(), strategy=strategy)
    right = dict(make().named_parameters())
    before = sent(model)
    for name, p in model.named_parameters():
        with zero.GatheredParameters([p]):
            assert torch.equal(p.float(), right[name].to(p.dtype).float())
    read = sent(model)
    for name, p in model.named_parameters():
        with zero.GatheredParameters([p], modifier_rank=1), torch.no_grad():
            if rank() == 1:
                p.copy_(right[name].to(p.dtype) * 2)
    written = sent(model)
    assert sum(unit.here for unit in engine_of(model).units) <= 1
    found = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    assert engine_of(model).last_gathered is None
    return [
        read.get("gather", 0) - before.get("gather", 0),
        written.get("broadcast", 0) - read.get("broadcast", 0),
    ], found


def whole_bytes(model):
    return sum(-(-p.numel() // 32) * 32 * p.element_size() for p in model.parameters())


def test_values_cross_the_wire_once():
    one, other = run(2, loops, "zero3")
    size = whole_bytes(make())
    for gathered, _ in (one[0], other[0]):
        assert 0 < gathered <= 0.75 * size  # this rank's half, padded
    assert one[0][1] + other[0][1] <= 1.5 * size
    for name, value in make().named_parameters():
        assert torch.equal(one[1][name], value * 2) and torch.equal(other[1][name], value * 2)


def sevens(params):
    for p in params:
        p.detach().fill_(7)


def beside(strategy):
    model = shardwise.fully_shard(make(), strategy=strategy)
    p, other = model.blocks[0].up.weight, model.blocks[0].down.weight
    with pytest.raises(WriteLost, match="only came along"), zero.GatheredParameters([p], modifier_rank=1):
        sevens([p, other] if rank() == 1 else [])
    with zero.GatheredParameters([p, other]):
        assert not bool((p == 7).any()) and not bool((other == 7).any())
    with zero.GatheredParameters([p, other], modifier_rank=0):
        p.data.fill_(rank())
        other.data.fill_(rank())
    with zero.GatheredParameters([p, other]):
        assert bool((p == 0).all()) and bool((other == 0).all())


def test_a_write_to_what_only_came_along():
    run(2, beside, "zero3")


class Late(nn.Module):
    """Makes its parts empty, and fills them afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.one = skip_init(nn.Linear, 6, 6)
        self.both = nn.Sequential(skip_init(nn.Linear, 6, 5), nn.ReLU())
        for p in self.parameters():
            nn.init.constant_(p, 3.0 + rank())


def parked():
    with zero.Init():
        model = Late()
    for p in model.parameters():
        assert isinstance(p, Guard) and p.ds_status is zero.ZeroParamStatus.NOT_AVAILABLE
        assert p.ds_tensor.shape == (math.ceil(p.numel() / world()),)
        assert bool((p.ds_tensor[: p.numel() // 2] == 3).all())
        with zero.GatheredParameters(p):
            assert bool((p == 3).all())


def test_modules_whose_parameters_are_replaced_are_split_too():
    run(2, parked)
