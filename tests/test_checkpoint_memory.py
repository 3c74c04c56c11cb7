"""What saving and loading take of a host's memory beside the run's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardwise
from ranks import run
from shardwise import checkpoint
from shardwise.checkpoint.manifest import BLOCK
from slowly import slow
from test_load_model import Deep, large_blocks_apart, peak_of

MIB = 1 << 20


def grown(path, strategy: str, width: int, depth: int) -> tuple[int, int, bool]:
    """Bytes by which this rank grows in a save and in a load, and whether the state is what it was."""

    def everything() -> list[float]:
        with torch.no_grad(), shardwise.gathered(model):
            values = [p.double().sum().item() for p in model.parameters()]
        with shardwise.optimizer_state(optimizer) as state:
            return values + [s["exp_avg"].double().sum().item() for s in state.values()]

    large_blocks_apart()
    model = shardwise.fully_shard(Deep(1, width, depth), strategy=strategy, units=nn.Linear)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        model(torch.randn(2, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def save() -> None:
        checkpoint.save(path, models=[model], optimizers=[optimizer])

    def load() -> None:
        checkpoint.load(path, models=[model], optimizers=[optimizer])

    step()
    save(), load()  # imports, and what is allocated once
    before = everything()
    saved = peak_of(save)
    step()
    return saved, peak_of(load), everything() == before


@pytest.mark.parametrize(
    ("strategy", "width", "depth"),
    [("zero3", 1024, 16), slow("zero3,offload_params=nvme,offload_optimizer=nvme", 512, 64)],
)
def test_it_does_not_grow_with_the_state(tmp_path, strategy, width, depth):
    if "nvme" in strategy:
        strategy += f",nvme_path={tmp_path}"
    numel = width * width * depth
    state = 3 * 4 * numel // 2  # of each of two ranks: 96 MiB
    unit = 3 * 4 * width * width // 2 if "nvme" in strategy else 0
    for saved, loaded, equal in run(2, grown, tmp_path / "a", strategy, width, depth, fresh=True):
        assert equal
        # Saving has five blocks, loading three. What lives on a disk is a unit coming and one going.
        assert saved <= 5 * BLOCK + 2 * unit + MIB < state, saved / MIB
        assert loaded <= 3 * BLOCK + 2 * unit + MIB < state, loaded / MIB


def grown_from_deepspeed(path, strategy: str, width: int, depth: int) -> tuple[int, bool]:
    """Bytes by which this rank grows while it loads a folder in DeepSpeed's layout, and whether it has its values."""
    large_blocks_apart()
    model = shardwise.fully_shard(Deep(1, width, depth), strategy=strategy, units=nn.Linear)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def load() -> None:
        checkpoint.load(path, models=[model], optimizers=[optimizer])

    def everything() -> list[float]:
        with torch.no_grad(), shardwise.gathered(model):
            values = [p.double().sum().item() for p in model.parameters()]
        with shardwise.optimizer_state(optimizer) as state:
            return values + [s["exp_avg"].double().sum().item() for s in state.values()]

    load()  # imports, and what is allocated once
    before = everything()
    model(torch.randn(2, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return peak_of(load), everything() == before


def export_for(path, width: int, depth: int, stage: int) -> int:
    """Write such a folder, of five ranks; bytes by which this process grows."""
    large_blocks_apart()
    model = Deep(1, width, depth)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.randn(2, width)).square().mean().backward()
    optimizer.step()
    checkpoint.save(path / "ours", models=[model], optimizers=[optimizer])
    checkpoint.export_deepspeed(path / "ours", path / "first", stage=stage, ranks=5)
    return peak_of(lambda: checkpoint.export_deepspeed(path / "ours", path / "run", stage=stage, ranks=5))


@pytest.mark.parametrize("stage", [slow(2), 3])
def test_deepspeeds_folders_in_blocks(tmp_path, stage):
    width, depth = 1024, 16
    state = 3 * 4 * width * width * depth // 2  # of each of two ranks: 96 MiB
    (written,) = run(1, export_for, tmp_path, width, depth, stage, fresh=True)
    assert written <= 5 * BLOCK + 2 * MIB < state, written / MIB
    for loaded, equal in run(2, grown_from_deepspeed, tmp_path / "run", "zero3", width, depth, fresh=True):
        assert equal
        assert loaded <= BLOCK + 2 * MIB < state, loaded / MIB
