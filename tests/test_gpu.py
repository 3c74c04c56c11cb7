"""Training on an accelerator, against plain torch on the CPU: a selection that takes a minute on a real one.

Here the same runs on the simulated device. ``pytest -m gpu`` runs it where there is an accelerator, one rank of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardwise
from models import PRESETS, adamw, assert_close, assert_same, batch, loss_of, make, train_alone, whole
from ranks import run
from shardwise import checkpoint, device
from shardwise.comm import World

pytestmark = pytest.mark.timeout(300)

HOMES = {
    "optimizer": "offload_optimizer=cpu",
    "backward": "offload_optimizer=cpu,optimizer_in_backward=true",
    "gradients": "offload_grads=cpu",
    "all": "offload_params=cpu,offload_grads=cpu,offload_optimizer=cpu",
    "disk": "offload_params=nvme,offload_grads=cpu,offload_optimizer=nvme",
    "activations": "activation_offload=cpu,activation_checkpointing=true",
}
STRATEGIES = [*PRESETS, *(f"zero3,{home}" for home in HOMES.values()), f"ddp,{HOMES['optimizer']}"]
DTYPES = {"fp32": ("", 1e-3), "bf16": (",param_dtype=bf16", 0.2), "fp16": (",param_dtype=fp16", 0.1)}


@pytest.fixture(params=[pytest.param("accelerator", marks=pytest.mark.gpu), "sim"])
def kind(request: pytest.FixtureRequest) -> str:
    """The type of the device."""
    if request.param == "sim":
        request.getfixturevalue("simulated_device")
        return "sim"
    found = device.accelerator()
    if found is None:
        pytest.skip("no accelerator")
    return found


def train(strategy: str, steps: int = 4):
    """Steps on the rows of one rank, with clipping; returns the model, its optimizer and its whole state."""
    on = World.current().device
    model = shardwise.fully_shard(make().to(on), strategy=strategy)
    clipped = "in_backward" not in strategy
    optimizer = adamw(model.parameters())
    shardwise.attach(optimizer)
    for step in range(steps):
        loss_of(model, batch(step, 0).to(on)).backward()
        if clipped:
            shardwise.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, {name: value.detach().cpu().float() for name, value in whole(model).items()}


def trains_as_on_the_cpu(strategies: list[str], tolerance: float) -> None:
    torch.set_float32_matmul_precision("highest")
    for strategy in strategies:
        expected = train_alone(1, clip=None if "in_backward" in strategy else 0.5)[2]
        assert_close(train(strategy)[2], expected, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training(kind, dtype, tmp_path):
    more, tolerance = DTYPES[dtype]
    disk = f",nvme_path={tmp_path}"
    strategies = [f"{s}{more}{disk if 'nvme' in s else ''}" for s in STRATEGIES]
    run(1, trains_as_on_the_cpu, strategies, tolerance, device=kind)


def goes_on(folder: str) -> None:
    """Saved from one home, loaded into others."""
    everything = f"zero3,{HOMES['all']}"
    model, optimizer, expected = train(everything, steps=2)
    checkpoint.save(folder, models=[model], optimizers=[optimizer])
    for strategy in ("ddp", everything, f"zero2,{HOMES['optimizer']}"):
        torch.manual_seed(1)
        other = shardwise.fully_shard(make().to(World.current().device), strategy=strategy)
        again = adamw(other.parameters())
        checkpoint.load(folder, models=[other], optimizers=[again])
        assert_same({name: value.detach().cpu() for name, value in whole(other).items()}, expected)
        assert all(int(state["step"]) == 2 for state in again.state.values())


def test_checkpoints(kind, tmp_path):
    run(1, goes_on, str(tmp_path / "checkpoint"), device=kind)


def accelerates(precision: str) -> None:
    accelerator = shardwise.Accelerator(strategy="zero3", mixed_precision=precision)
    model = make()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    assert accelerator.device == World.current().device != torch.device("cpu")
    losses = []
    for _ in range(8):
        loss = loss_of(model, batch(0, 0).to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_accelerator(kind, precision):
    run(1, accelerates, precision, device=kind)


@pytest.mark.slow
@pytest.mark.usefixtures("simulated_device")
def test_the_benchmark_of_the_first_day(tmp_path):
    """All of ``benchmarks/gpu.sh`` on the simulated device: each part ends well, and leaves its result."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--tiny", "--plugin", "simulated_device", "--arms", "sw-device,sw-cpu-all"],
        cwd=root, env=os.environ | {"PYTHONPATH": "tests", "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = [json.loads(line) for line in (tmp_path / "gpu-parts.jsonl").read_text().splitlines()]
    assert [p["part"] for p in parts] == ["environment", "tests", "correctness", "figures", "two-ranks"]
    assert {p.name for p in tmp_path.glob("*.json")} >= {
        "gpu-environment.json", "gpu-check.json", "gpu-tiny.json", "gpu-two-ranks.json"
    }  # fmt: skip
    tried = json.loads((tmp_path / "gpu-two-ranks.json").read_text())["tried"]
    assert all(way["works"] for way in tried.values())
