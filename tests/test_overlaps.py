"""Parameters that are two objects over one memory, or views of one another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardwise
from models import PRESETS
from shardwise.errors import UnitError


def in_a_row(first: nn.Parameter, second: nn.Parameter) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight, model[1].weight = first, second
    return model


def test_parameters_that_share_memory_are_named():
    for device in ("cpu", "meta"):
        memory = torch.randn(12, 16, device=device)
        for first, second, match in (
            (memory[:8, :8], memory[:8, :8], r"'0.weight' and '1.weight' are two objects(.|\n)*1.weight = 0.weight"),
            (memory[:8, :8], memory[2:10, :8], r"'0.weight' and '1.weight' overlap"),
            (memory[:8, :8], memory[:8, 7:15], r"'0.weight' and '1.weight' overlap"),
            (memory[:8, :8].t(), memory[:8, :8], r"'0.weight' and '1.weight' are two objects|overlap"),
        ):
            for strategy in PRESETS:
                with pytest.raises(UnitError, match=match):
                    shardwise.fully_shard(in_a_row(nn.Parameter(first), nn.Parameter(second)), strategy=strategy)
        for first, second in ((memory[:8, :8], memory[:8, 8:]), (memory[:4].view(8, 8), memory[4:8].view(8, 8))):
            shardwise.fully_shard(in_a_row(nn.Parameter(first), nn.Parameter(second)))
    model = in_a_row(nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8)))
    shardwise.fully_shard(model[0], strategy="ddp")
    model[1].weight.data = model[0].weight.data
    with pytest.raises(UnitError, match="two objects"):
        shardwise.fully_shard(model)
