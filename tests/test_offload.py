"""Optimizer state at home on the CPU or on a disk: the same bits as without, in a fixed amount of memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import shardwise
from models import PRESETS, assert_same, batch, loss_of, make, rank, train, whole
from ranks import run

HOMES = ["cpu", "nvme"]


def offloaded(strategy: str, home: str, path: Any) -> str:
    return f"{strategy},offload_optimizer={home},nvme_path={path}"


def pairs(strategy: str, path: str, kw: dict[str, Any]) -> None:
    plain = train(strategy, **kw)
    for home in HOMES:
        losses, norms, weights = train(offloaded(strategy, home, path), **kw)
        assert losses == plain[0], home
        assert norms == plain[1], home
        assert_same(weights, plain[2])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("strategy", [*PRESETS, "hsdp,shard_size=2"])
def test_same_bits(strategy, world, tmp_path):
    if world == 1 and "hsdp" in strategy:
        pytest.skip("nothing to split")
    run(world, pairs, strategy, str(tmp_path), {"steps": 3})
