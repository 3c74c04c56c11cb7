"""The same script on every device there is, through the launcher: CPU and gloo here, CUDA and NCCL where it exists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys

import torch
import shardwise
from models import adamw, assert_close, batch, loss_of, make, whole

world = shardwise.init()
for precision in ("", ",param_dtype=bf16"):
    model, oracle = make().to(world.device), make().to(world.device)
    shardwise.fully_shard(model, strategy=shardwise.Strategy.parse("STRATEGY" + precision))
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
    assert_close(whole(model), whole(oracle), 1e-3 if not precision else 0.2)
    assert next(iter(whole(model).values())).device == world.device
sys.stdout.write(f"trained on {world.device} over {world.size}\\n")  # in one piece, beside the other ranks'
"""


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training(device, strategy, tmp_path: Path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ranks = 2 if device == "cpu" else torch.cuda.device_count()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("STRATEGY", strategy))
    command = [sys.executable, "-m", "shardwise", "launch", "--nproc", str(ranks)]
    command += ["--cpu"] if device == "cpu" else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([*command, str(script)], env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"over {ranks}") == ranks and f"trained on {device}" in done.stdout
