"""Peaks of live bytes: what a plan says, beside what ranks count in such a step; and few blocks beside all."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
from ranks import run
from shardwise.engine.build import no_sync
from shardwise.plan.machine import Machine
from shardwise.plan.optimizers import optimizer
from shardwise.plan.prediction import Training, prediction
from shardwise.plan.subject import resolve
from test_simulated_training import HOMES

WIDTH, VOCAB, LENGTH = 192, 256, 24
BLOCKS, MANY = 4, 7  # the latter are so many that a plan takes fewer, and lines between them
SIM = "sim:0"


class Block(nn.Module):
    """Operations that are the same on every device; wide enough to be reduced without company in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class LM(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def make(batch: int, blocks: int = BLOCKS) -> tuple[nn.Module, torch.Tensor, Any]:
    return LM(blocks), torch.zeros(batch, LENGTH, dtype=torch.long), loss_of


def make_deep(batch: int) -> tuple[nn.Module, torch.Tensor, Any]:
    return make(batch, MANY)


def strategy_of(text: str, folder: Any) -> shardwise.Strategy:
    return shardwise.Strategy.parse(text + f",nvme_path={folder}" * ("nvme" in text))


def measured(strategy: shardwise.Strategy, training: Training, device: str) -> tuple[int, int, dict[str, int]]:
    """Peaks on the device and on the host, of steps as a script writes them; bytes by state at the former."""
    model, ids, _ = make(training.subject.batch)
    model.to(device)
    parameters = list(model.parameters())
    shardwise.fully_shard(model, strategy=strategy)
    optimizers = optimizer(training.optimizer)(parameters)
    for one in optimizers:
        shardwise.attach(one)
    unreduced = no_sync if strategy.preset in ("ddp", "zero1") else nullcontext
    peaks, host = [], 0
    for _ in range(2):
        with shardwise.memory_meter(model) as meter:
            for micro in range(training.accumulation):
                with unreduced(model) if micro + 1 < training.accumulation else nullcontext():
                    loss_of(model, ids.to(device, copy=True)).backward()
            if training.clip is not None:
                shardwise.clip_grad_norm_(model, training.clip)
            for one in optimizers:
                one.step()
            for one in optimizers:
                one.zero_grad()
        peaks.append((meter.peak_total, {state: nbytes for state, nbytes in meter.peak.items() if nbytes}))
        host = max(host, meter.host_peak_total)
    nbytes, states = max(peaks, key=lambda told: told[0])
    return nbytes, host, states


def training_of(
    strategy: shardwise.Strategy, named: str = "adamw", rows: int = 4, accumulation: int = 1, made: str = "make"
) -> Training:
    clip = None if strategy.optimizer_in_backward else 1.0
    return Training(resolve(f"test_plan_memory:{made}", batch=rows), named, accumulation, clip)


@pytest.mark.parametrize(
    ("text", "size", "more"),
    [
        ("ddp", 2, {"accumulation": 3}),
        pytest.param("zero1", 2, {"named": "momentum"}, marks=pytest.mark.slow),
        pytest.param("zero2,param_dtype=bf16", 2, {"accumulation": 2}, marks=pytest.mark.slow),
        ("zero2,optimizer_in_backward=true", 2, {}),
        ("zero3,activation_checkpointing=true", 2, {"rows": 16}),
        pytest.param("zero3,layout=tensor", 2, {"named": "muon"}, marks=pytest.mark.slow),
        ("zero3,offload_params=nvme,offload_optimizer=nvme", 2, {}),
        ("hsdp,shard_size=2", 4, {"rows": 1}),
    ],
)
def test_peaks_on_a_cpu_are_predicted_to_the_byte(text, size, more, tmp_path):
    strategy = strategy_of(text, tmp_path)
    training = training_of(strategy, **more)
    nbytes, _, states = run(size, measured, strategy, training, "cpu")[0]
    told = prediction(training, Machine.parse(f"{size}xcpu"), strategy)
    assert (told.device.nbytes, told.device.states) == (nbytes, states)


@pytest.mark.parametrize(
    ("preset", "home"),
    [
        ("zero3", "all-nvme"), ("zero3", "activations-checkpointed"),
        *(
            pytest.param(preset, home, marks=pytest.mark.slow)
            for preset, home in (
                ("ddp", "all-cpu"),
                ("zero1", "optimizer-nvme"), ("zero2", "optimizer-half-cpu"), ("zero2", "grads-cpu"),
                ("zero3", "device"),
            )
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("simulated_device")
def test_peaks_on_an_accelerator_and_its_host_are_predicted(preset, home, tmp_path):
    strategy = shardwise.Strategy(preset, **HOMES[home], nvme_path=str(tmp_path) if "nvme" in home else None)
    training = training_of(strategy)
    nbytes, host, states = run(2, measured, strategy, training, SIM, device="sim")[0]
    told = prediction(training, Machine.parse("2xA100-80GB"), strategy)
    if strategy.activation_offload == "device":
        assert (told.device.nbytes, told.device.states) == (nbytes, states)
    else:
        # This device may be as late as the backward with copies to the host, and keep what they read so long.
        late = told.host.states["host_activations"] + told.host.states["activations"]
        assert told.device.nbytes <= nbytes <= told.device.nbytes + late, states
    # Pinned buffers of this device have a page more than CUDA's; how soon the host lets go of them is about time.
    assert 0.998 * host - 64 <= told.host.nbytes <= 1.03 * host + 64


@pytest.mark.parametrize(
    ("text", "machine"),
    [
        *(pytest.param(text, "4xA100-80GB", marks=pytest.mark.slow) for text in ("ddp", "zero1", "hsdp,shard_size=2")),
        ("zero3", "4xA100-80GB"),
        pytest.param("zero2", "4xcpu", marks=pytest.mark.slow),
        pytest.param("zero2", "4xA100-80GB", marks=pytest.mark.slow),
        ("zero2,param_dtype=bf16", "4xcpu"),
    ],
)
def test_few_blocks_say_what_all_of_them_do(text, machine):
    """In bf16 the blocks are reduced together, which no line foretells: that is found out."""
    strategy = shardwise.Strategy.parse(text)
    training = training_of(strategy, made="make_deep")
    few = prediction(training, Machine.parse(machine), strategy, whole=None if "bf16" in text else False)
    every = prediction(training, Machine.parse(machine), strategy, whole=True)
    assert (few.device.nbytes, few.device.states) == (every.device.nbytes, every.device.states)
    assert few.host.nbytes == every.host.nbytes and few.between == every.between
