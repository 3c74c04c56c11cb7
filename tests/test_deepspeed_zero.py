"""``shardwise.deepspeed.zero``: models that are built a part on each rank, gathered parameters, probes, leaves."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
from models import PRESETS, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise.deepspeed import zero
from shardwise.deepspeed.zero.leaf import leaf_units, set_z3_leaf_modules
from shardwise.deepspeed.zero.probes import mark
from shardwise.engine.parked import is_parked
from shardwise.errors import ConfigError, ShardwiseError, UnitError

AVAILABLE, AWAY = zero.ZeroParamStatus.AVAILABLE, zero.ZeroParamStatus.NOT_AVAILABLE
HOMES = [None, "cpu", "nvme"]


class Part(nn.Module):
    """What constructors do: parameters computed from others, other modules' values written and read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.normal_(self.up.weight, std=0.3)
        self.gain = nn.Parameter(torch.ones(width) * self.up.weight[0].detach().mean())
        self.register_buffer("steps", torch.linspace(0, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x))) * self.gain * self.steps


class Net(nn.Module):
    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.inp = nn.Linear(8, width)
        rates = [float(rate) for rate in torch.linspace(0, 0.1, depth)]  # values, which the meta device has not
        self.blocks = nn.ModuleList([Part(width) for _ in rates])
        self.out = nn.Linear(width, 8)
        self.tied = nn.Linear(width, 8, bias=False)
        self.tied.weight = self.out.weight
        self.copied = nn.Parameter(self.inp.weight.detach().t().clone())
        self.apply(self._draw)
        for p in self.parameters():
            if p.dim() == 2:
                with torch.no_grad():
                    p.mul_(1.5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        with torch.no_grad():
            self.blocks[1].up.weight.copy_(self.blocks[0].up.weight).add_(self.blocks[2].up.weight)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inp(x) + x @ self.copied
        for block in self.blocks:
            hidden = block(hidden)
        return self.tied(hidden) * self.scale + self.out(hidden)


def built(kind=Net, seed: int = 3, **kwargs):
    """The model, as ordinary code builds it, and a rank's random state after that."""
    torch.manual_seed(seed)
    model = kind(**kwargs)
    return model, torch.get_rng_state()


def builds(where, strategy):
    plain, after = built()
    with zero.Init(remote_device=where):
        model, state = built(seed=3 if rank() == 0 else 4)
    assert rank() > 0 or torch.equal(state, after)
    split = [is_parked(p) for p in model.parameters()]
    assert all(split) if world() > 1 or where == "nvme" else not any(split)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(p.shape) for n, p in plain.named_parameters()
    }
    shardwise.fully_shard(model, strategy=strategy)
    found = whole(model)
    assert_same(found, whole(plain))
    model(torch.ones(2, 8)).sum().backward()


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "zero2,param_dtype=bf16,autocast=true", "zero3,offload_params=nvme"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_are_those_of_ordinary_construction(size, strategy):
    for where in HOMES:
        run(size, builds, where, strategy)
