"""Whole runs by a configuration: its optimizers and schedules under every stage, and however a step is split."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
import torch

import shardwise.deepspeed as deepspeed
from models import assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "bias_correction": False},
    "Adagrad": {"lr": 0.05},
    "Lion": {"lr": 0.01},
    "Lamb": {"lr": 0.01},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Muon": {"lr": 0.02, "weight_decay": 0.1},
}


def config(name: str, stage: int = 0, micro: int = 4, steps: int = 1, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "optimizer": {"type": name, "params": OPTIMIZERS[name]},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 2}},
        "gradient_clipping": 0.3,
        "zero_optimization": {"stage": stage, **zero},
    }


def trained(settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Three steps of four rows on each rank, in as many micro-batches as it says."""
    model = make()
    engine, optimizer, _, scheduler = deepspeed.initialize(model=model, config=settings)
    rates = []
    for step in range(3):
        for rows in batch(step, rank(), rows=4).chunk(engine.gradient_accumulation_steps()):
            engine.backward(loss_of(engine, rows))
            engine.step()
        rates.append(scheduler.get_last_lr()[0])
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    return whole(model), rates


def under_every_stage(name: str) -> None:
    first, rates = trained(config(name))
    assert rates == [0.0, rates[-1], rates[-1]] and rates[-1] == OPTIMIZERS[name]["lr"]
    for stage in (1, 2, 3):
        found, _ = trained(config(name, stage))
        assert_same(found, first)
    found, _ = trained(config(name, 3, offload_optimizer={"device": "nvme"}))
    assert_same(found, first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_a_configuration(name):
    run(2, under_every_stage, name)


def in_micro_batches() -> None:
    for name, tol in (("Adam", 1e-5), ("Muon", 2e-3)):  # Muon orthogonalises in bf16
        for stage in (0, 3):
            together, _ = trained(config(name, stage))
            apart, _ = trained(config(name, stage, micro=1, steps=4))
            assert_close(apart, together, tol)


def test_a_step_is_the_same_however_it_is_split():
    run(2, in_micro_batches)


def test_the_launchers_configuration_is_used_where_the_script_names_none(monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(config("Adam", 1)))
    monkeypatch.setenv("SHARDWISE_DEEPSPEED_CONFIG", str(tmp_path / "ds.json"))
    engine, *_ = deepspeed.initialize(model=make())
    assert engine.zero_optimization_stage() == 1
    engine.destroy()
    engine, *_ = deepspeed.initialize(model=make(), config=config("Adam", 2))
    assert engine.zero_optimization_stage() == 2
    engine.destroy()
    assert deepspeed.add_tuning_arguments(argparse.ArgumentParser()).parse_args([]).lr_schedule is None
