"""One script under both libraries: real DeepSpeed, where it is installed, and ours with the import changed."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch

from models import assert_close, batch, loss_of, make, rank
from ranks import run

pytest.importorskip("deepspeed")
OURS, REAL = "shardwise.deepspeed", "deepspeed"


def library(name: str) -> Any:
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_IGNORE_CUDA_DETECTION": "1"}
    os.environ.setdefault("LOCAL_RANK", str(rank()))
    found = importlib.import_module(name)
    if name == REAL:
        found.accelerator.get_accelerator().is_fp16_supported = lambda: True  # torch's CPU kernels have it by now
    return found


def values(engine: Any, name: str) -> dict[str, torch.Tensor]:
    """Whole weights, under either library."""
    if name == OURS:
        return {k: v.detach().float().clone() for k, v in engine.module.state_dict().items()}
    real = importlib.import_module("deepspeed")
    params = list(engine.module.named_parameters())
    with real.zero.GatheredParameters([p for _, p in params], enabled=hasattr(params[0][1], "ds_id")):
        return {n: p.detach().float().clone() for n, p in params}


def script(name: str, config: dict[str, Any], steps: int = 5, plain: bool = False) -> Any:
    """Losses, norms, rates, counters and weights."""
    deepspeed = library(name)
    model = make(odd=False)
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
        config=config,
    )
    seen: list[Any] = []
    scales: list[Any] = []
    for index in range(steps * engine.gradient_accumulation_steps()):
        loss = loss_of(engine, batch(index, rank()))
        loss.backward() if plain else engine.backward(loss)
        ends = engine.is_gradient_accumulation_boundary()
        engine.step()
        norm = engine.get_global_grad_norm() if ends else None
        seen.append((loss.item(), None if norm is None else float(norm), engine.get_lr()[0]))
        scales.append(getattr(optimizer, "cur_scale", None))
    counters = (engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps)
    return seen, counters, values(engine, name), scales


def settings(stage: int, gas: int = 1, clip: float = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    } | more


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_curve(stage):
    for config in (settings(stage, 1, 0.0), settings(stage, 3, 0.5)):
        real = run(2, script, REAL, config, fresh=True)
        ours = run(2, script, OURS, config)
        for theirs, mine in zip(real, ours, strict=True):
            assert [s[0] for s in mine[0]] == pytest.approx([s[0] for s in theirs[0]], rel=2e-5)
            for (_, norm, rate), (_, own, own_rate) in zip(theirs[0], mine[0], strict=True):
                assert own_rate == pytest.approx(rate, rel=1e-6)
                if norm is not None:
                    assert own == pytest.approx(norm, rel=2e-5)
            assert mine[1] == theirs[1]
            assert_close(mine[2], theirs[2], 2e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_curve_in_fp16(stage):
    """Whose gradients cross the wire in fp16 there, and in fp32 here: the curves are the same to fp16's rounding."""
    config = settings(stage, 2, 1.0, fp16={"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2})
    real = run(2, script, REAL, config, 8, fresh=True)
    ours = run(2, script, OURS, config, 8)
    for theirs, mine in zip(real, ours, strict=True):
        assert mine[3] == theirs[3]  # the scales
        assert mine[1] == theirs[1]
        assert [s[0] for s in mine[0]] == pytest.approx([s[0] for s in theirs[0]], rel=1e-2)
        assert mine[1][3] > 0  # it did overflow


@pytest.mark.parametrize("stage", [2, 3])
def test_the_same_curve_with_state_on_the_host(stage):
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    config = settings(stage, 2, 0.5, zero_optimization=zero, zero_force_ds_cpu_optimizer=False)
    real = run(2, script, REAL, config, fresh=True)
    ours = run(2, script, OURS, config)
    for theirs, mine in zip(real, ours, strict=True):
        assert [s[0] for s in mine[0]] == pytest.approx([s[0] for s in theirs[0]], rel=2e-5)
        assert mine[1] == theirs[1]
        assert_close(mine[2], theirs[2], 2e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
        {"gradient_predivide_factor": 4.0},
        {"communication_data_type": "fp32"},
        {"gradient_allreduce_op": "sum"},
    ],
)
def test_the_same_curve_however_gradients_are_summed(keys):
    config = settings(0, 2, 0.5, **keys)
    real = run(2, script, REAL, config, fresh=True)
    ours = run(2, script, OURS, config)
    for theirs, mine in zip(real, ours, strict=True):
        assert [s[0] for s in mine[0]] == pytest.approx([s[0] for s in theirs[0]], rel=2e-5)
        assert_close(mine[2], theirs[2], 2e-5)


def bf16_script(name: str, config: dict[str, Any]) -> Any:
    return script(name, config, 6)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_same_curve_in_bf16(stage):
    """To bf16's rounding: there gradients cross the wire in bf16, and here in fp32."""
    config = settings(stage, 2, 1.0, bf16={"enabled": True})
    real = run(2, bf16_script, REAL, config, fresh=True)
    ours = run(2, bf16_script, OURS, config)
    for theirs, mine in zip(real, ours, strict=True):
        assert mine[1] == theirs[1]
        assert [s[0] for s in mine[0]] == pytest.approx([s[0] for s in theirs[0]], rel=3e-2)


OPTIMIZERS = {
    "Adam": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True},
    "AdamW": {"lr": 1e-2, "betas": [0.8, 0.9], "weight_decay": 0.1, "torch_adam": True},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}
SCHEDULES = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.02, "warmup_num_steps": 4},
    "WarmupDecayLR": {"warmup_max_lr": 0.02, "warmup_num_steps": 2, "total_num_steps": 6},
    "WarmupCosineLR": {"warmup_num_steps": 2, "total_num_steps": 6},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 2e-2, "cycle_first_step_size": 3, "decay_lr_rate": 0.1},
}


def configured(name: str, config: dict[str, Any], steps: int = 6) -> Any:
    """Everything from the configuration."""
    deepspeed = library(name)
    model = make(odd=False)
    engine, _, _, scheduler = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    assert scheduler is engine.lr_scheduler
    losses, rates = [], []
    for index in range(steps):
        loss = loss_of(engine, batch(index, rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        rates.append((engine.get_lr()[0], engine.get_mom()[0]))
    return losses, rates


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("Adam", "WarmupLR"), ("AdamW", "WarmupDecayLR"), ("SGD", "WarmupCosineLR"), ("Adam", "OneCycle")],
)
def test_optimizers_and_schedules_of_the_configuration(optimizer, schedule):
    config = settings(
        2,
        optimizer={"type": optimizer, "params": OPTIMIZERS[optimizer]},
        scheduler={"type": schedule, "params": SCHEDULES[schedule]},
    )
    real = run(2, configured, REAL, config, fresh=True)
    ours = run(2, configured, OURS, config)
    for theirs, mine in zip(real, ours, strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=2e-5)
        for (rate, moment), (own_rate, own_moment) in zip(theirs[1], mine[1], strict=True):
            assert own_rate == pytest.approx(rate, rel=1e-6, abs=1e-12)
            assert own_moment == pytest.approx(moment, rel=1e-6)


def saved_by_deepspeed(config: dict[str, Any], folder: str) -> Any:
    """Three steps, a checkpoint, three more."""
    engine = on_schedule(REAL, config, 0)
    some(engine, 0, 3)
    engine.save_checkpoint(folder, client_state={"epoch": 3})
    losses = some(engine, 3, 6)
    scale = engine.optimizer.cur_scale if "fp16" in config else 1.0
    return losses, engine.get_lr(), (engine.global_steps, engine.global_samples, engine.skipped_steps), scale


def resumed(config: dict[str, Any], folder: str) -> Any:
    engine = on_schedule(OURS, config, 1)
    path, client_state = engine.load_checkpoint(folder)
    assert path.endswith("global_step3")
    assert client_state["epoch"] == 3
    losses = some(engine, 3, 6)
    return losses, engine.get_lr(), (engine.global_steps, engine.global_samples, engine.skipped_steps), engine.cur_scale


def on_schedule(name: str, config: dict[str, Any], seed: int) -> Any:
    model = make(seed, odd=False)
    engine, *_ = library(name).initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
        config=config,
    )
    return engine


def some(engine: Any, first: int, last: int) -> list[float]:
    losses = []
    for index in range(first, last):
        loss = loss_of(engine, batch(index, rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


FP16 = {"fp16": {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 2}}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_of_deepspeeds_goes_on(stage, precision, tmp_path):
    pytest.importorskip("shardwise.checkpoint.deepspeed_contents")  # what reads DeepSpeed's folders
    more = FP16 if precision == "fp16" else {}
    real = run(2, saved_by_deepspeed, settings(stage, **more), str(tmp_path), fresh=True)
    for other in (stage, 0 if stage == 3 else 3):
        ours = run(2, resumed, settings(other, **more), str(tmp_path))
        for theirs, mine in zip(real, ours, strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-2 if more else 2e-5)
            assert mine[1] == pytest.approx(theirs[1])
            assert mine[2:] == theirs[2:]
