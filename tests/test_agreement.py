"""Ranks that shard different things say so at once, all of them, instead of waiting for each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
import shardwise
from shardwise.errors import ShardwiseError, StrategyError, UnitError

STRATEGIES = [
    ("zero3", "zero2", "preset=zero3 on rank 0, preset=zero2 on rank 1"),
    ("ddp", "zero1", "preset=ddp on rank 0, preset=zero1 on rank 1"),
    ("zero3", "zero3,param_dtype=bf16", "param_dtype=None on rank 0, param_dtype=bf16 on rank 1"),
    ("zero2", "zero2,offload_optimizer=cpu", "offload_optimizer=device on rank 0, offload_optimizer=cpu on rank 1"),
    ("hsdp,shard_size=1", "hsdp,shard_size=2", "shard_size=1 on rank 0, shard_size=2 on rank 1"),
]
MODELS = {
    "longer": "unit '0' on rank 0, parameter '2.weight' (4, 4) float32 on rank 1",
    "wider": "parameter '1.weight' (4, 4) float32 on rank 0, parameter '1.weight' (5, 4) float32 on rank 1",
    "frozen": "(4, 4) float32 on rank 0, parameter '1.weight' (4, 4) float32 frozen on rank 1",
    "dtype": "(4, 4) float32 on rank 0, parameter '1.weight' (4, 4) float64 on rank 1",
    "units": "unit '0' on rank 0, unit '1' on rank 1",
}


def _model(odd: str | None) -> nn.Sequential:
    last = nn.Linear(4, 5 if odd == "wider" else 4, dtype=torch.float64 if odd == "dtype" else None)
    if odd == "frozen":
        last.weight.requires_grad_(False)
    return nn.Sequential(nn.Linear(4, 4), last, *([nn.Linear(4, 4)] if odd == "longer" else []))


def _train(model: nn.Module) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def _sharded(strategies: tuple[str, str], odd: str | None = None) -> tuple[type, str] | None:
    found, rank = None, dist.get_rank()
    mine = odd if rank else None
    units: Any = (lambda name, module: name == "1") if mine == "units" else None
    try:
        shardwise.fully_shard(_model(mine), strategy=strategies[rank], units=units)
    except ShardwiseError as error:
        found = type(error), str(error)
    torch.manual_seed(0)
    _train(shardwise.fully_shard(_model(None), strategy="zero3"))  # and nothing is under way
    return found


@pytest.mark.parametrize(("first", "second", "said"), STRATEGIES)
def test_strategies_that_differ_between_ranks_are_named_on_every_rank(first: str, second: str, said: str) -> None:
    for rank, found in enumerate(ranks.run(2, _sharded, (first, second))):
        assert found is not None
        kind, text = found
        assert kind is StrategyError and said in text and f"rank {rank}:" in text


@pytest.mark.parametrize("odd", MODELS)
def test_models_that_differ_between_ranks_are_named_on_every_rank(odd: str) -> None:
    for found in ranks.run(2, _sharded, ("zero3", "zero3"), odd):
        assert found is not None and found[0] is UnitError and MODELS[odd] in found[1]


def test_what_is_each_ranks_own_may_differ() -> None:
    assert ranks.run(2, _sharded, ("zero2,timeout=90", "zero2,timeout=80,offload_depth=2")) == [None, None]
