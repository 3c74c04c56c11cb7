"""The same script on every device there is, through the launcher: CPU and gloo here, CUDA and NCCL where it exists."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import processes
from models import PRESETS

SCRIPT = """
import sys

import torch
import shardwise
from models import adamw, assert_close, batch, loss_of, make, whole

world = shardwise.init()
accelerator = shardwise.Accelerator(gradient_accumulation_steps=2)
assert accelerator.gradient_accumulation_steps == 5, "the launcher's"
for strategy in sys.argv[1:]:
    model, oracle = make().to(world.device), make().to(world.device)
    shardwise.fully_shard(model, strategy=shardwise.Strategy.parse(strategy))
    opts = [adamw(m.parameters()) for m in (model, oracle)]
    for step in range(4):
        ids = [batch(step, r).to(world.device) for r in range(world.size)]
        loss_of(model, ids[world.rank]).backward()
        loss_of(oracle, torch.cat(ids)).backward()
        shardwise.clip_grad_norm_(model, 0.5)
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        for o in opts:
            o.step()
            o.zero_grad()
    assert_close(whole(model), whole(oracle), 1e-3 if "bf16" not in strategy else 0.2)
    assert next(iter(whole(model).values())).device == world.device
    sys.stdout.write(f"{strategy} on {world.device} over {world.size}\\n")  # in one piece, beside the other ranks'
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training(device: str, tmp_path: Path) -> None:
    """One launch for all strategies, and for the launcher's word to the Accelerator: the start costs most."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ranks = 2 if device == "cpu" else torch.cuda.device_count()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    strategies = [*PRESETS, *(f"{preset},param_dtype=bf16" for preset in PRESETS)]
    launch = ["-m", "shardwise", "launch", "--nproc", ranks, "--gradient-accumulation-steps", 5]
    launch += ["--cpu"] if device == "cpu" else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code, out, err = processes.program(*launch, script, *strategies, environment=environment).finish(150)
    assert code == 0, err[-2000:]
    for strategy in strategies:
        assert out.count(f"{strategy} on {device}") == ranks, strategy
    assert out.count(f"over {ranks}") == ranks * len(strategies)
