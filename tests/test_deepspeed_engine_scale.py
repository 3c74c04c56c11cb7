"""fp16's loss scale under DeepSpeed's calls, and steps that are skipped."""

from __future__ import annotations

import pytest
import torch

import shardwise.deepspeed as deepspeed
from models import batch, loss_of, make, rank, whole
from ranks import run
from shardwise.deepspeed.loss_scaler import LossScaler
from shardwise.deepspeed_config import LossScaling
from shardwise.errors import GradientError

OVERFLOWS = "0100111010000000110000010101"  # 1: the step met one
# (first scale, window, hysteresis, consecutive, smallest): the scale behind each step, as DeepSpeed 0.19.8 has it.
TABLE = {
    (256, 2, 1, False, 1): "256 128 128 128 64 32 16 16 8 8 8 16 16 32 32 64 32 16 16 16 32 32 64 32 32 16 16 8",
    (256, 2, 2, False, 1): (
        "256 256 256 256 128 64 32 32 16 16 16 32 32 64 64 128 128 64 64 64 128 128 256 256 256 128 128 64"
    ),
    (256, 3, 3, True, 1): (
        "256 256 256 256 256 256 128 128 128 128 128 128 256 256 256 512 512 512 512 512 512 1024 1024 1024 1024 1024 "
        "1024 1024"
    ),
    (256, 2, 2, True, 0.25): (
        "256 256 256 256 256 128 64 64 64 64 64 128 128 256 256 512 512 256 256 256 512 512 1024 1024 1024 1024 1024 "
        "1024"
    ),
    (16, 2, 1, False, 4): "16 8 8 8 4",  # and then there is no smaller one
}


@pytest.mark.parametrize("rule", TABLE)
def test_the_scale_follows_the_table(rule):
    initial, window, hysteresis, consecutive, minimum = rule
    scaler = LossScaler("cpu", LossScaling(None, initial, window, hysteresis, consecutive, minimum))
    expected = [float(scale) for scale in TABLE[rule].split()]
    found = []
    for overflow in OVERFLOWS[: len(expected)]:
        scaler.update_scale(overflow == "1")
        found.append(scaler.cur_scale)
    assert found == expected
    if len(expected) < len(OVERFLOWS):
        with pytest.raises(GradientError, match="smallest"):
            scaler.update_scale(OVERFLOWS[len(expected)] == "1")


def config(stage, gas=1, **fp16):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1} | fp16,
    }


def overflowing(stage, gas, only_rank, plain=False):
    """A run in which a loss of step 1 and one of step 4 is infinite on one rank."""
    model = make()
    engine, _, _, scheduler = deepspeed.initialize(
        model=model,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.5**n),
        config=config(stage, gas),
    )
    seen = []
    for step in range(6):
        before = whole(engine.module)
        for index in range(gas):
            loss = loss_of(engine, batch(step * gas + index, rank()))
            if step in (1, 4) and index == 0 and rank() == only_rank:
                loss = loss * float("inf")
            engine.scale(loss).backward() if plain else engine.backward(loss)
            engine.step()
        changed = any(not torch.equal(before[k], v) for k, v in whole(engine.module).items())
        assert changed == engine.was_step_applied() != engine.optimizer.overflow
        seen.append((changed, engine.cur_scale, scheduler.last_epoch, engine.skipped_steps, engine.global_steps))
        assert (engine.get_global_grad_norm() is None) == (not changed)
    return seen, whole(engine.module)


@pytest.mark.parametrize("gas", [1, 2])
def test_a_step_with_an_overflow_on_one_rank_is_skipped_on_all(gas):
    steps = [
        (True, 256, 1, 0, 1), (False, 128, 1, 1, 2), (True, 128, 2, 1, 3),
        (True, 128, 3, 1, 4), (False, 64, 3, 2, 5), (True, 64, 4, 2, 6),
    ]  # fmt: skip
    weights = None
    for stage in (0, 2, 3):
        for plain in (False, True):
            one, other = run(2, overflowing, stage, gas, 1, plain)
            assert one[0] == other[0] == steps, (stage, plain)
            for k, value in one[1].items():
                assert torch.isfinite(value).all()
                assert torch.equal(value, other[1][k])
            weights = weights or one[1]
            if gas == 1:
                assert all(torch.equal(value, weights[k]) for k, value in one[1].items())


def static(stage):
    engine, *_ = deepspeed.initialize(
        model=make(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), config=config(stage, loss_scale=64)
    )
    scales = []
    for step in range(3):
        loss = loss_of(engine, batch(step, rank()))
        engine.backward(loss * (float("inf") if step == 1 else 1.0))
        engine.step()
        scales.append((engine.cur_scale, engine.skipped_steps))
    return scales, engine.dynamic_loss_scale()


def test_a_static_scale_stays():
    assert run(2, static, 2)[0] == ([(64, 0), (64, 1), (64, 1)], False)


def unscaled():
    engine, *_ = deepspeed.initialize(model=make(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), config=config(2))
    with pytest.raises(GradientError, match=r"engine\.backward"):
        loss_of(engine, batch(0, rank())).backward()
    with pytest.raises(GradientError, match=r"engine\.scale"):  # the model by itself is no way around it
        loss_of(engine.module, batch(0, rank())).backward()
    engine.zero_grad()
    engine.backward(loss_of(engine, batch(0, rank())))
    engine.step()
    return engine.was_step_applied(), whole(engine.module)


def scaled():
    engine, *_ = deepspeed.initialize(model=make(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), config=config(2))
    engine.backward(loss_of(engine, batch(0, rank())))
    engine.step()
    return engine.was_step_applied(), whole(engine.module)


def test_a_loss_that_is_not_scaled_is_refused_and_leaves_nothing():
    (applied, weights), _ = run(2, unscaled)
    (_, right), _ = run(2, scaled)
    assert applied
    assert all(torch.equal(value, right[k]) for k, value in weights.items())


def bf16(checked):
    section = {"enabled": True} | ({} if checked else {"check_grad_overflow": False})
    engine, *_ = deepspeed.initialize(
        model=make(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}, "bf16": section},
    )
    loss = loss_of(engine, batch(0, rank()))
    engine.backward(loss * (float("inf") if rank() == 0 else 1.0))
    engine.step()
    return engine.was_step_applied(), engine.skipped_steps, all(torch.isfinite(v).all() for v in whole(engine).values())


def test_bf16_skips_what_is_not_finite_unless_told_not_to():
    assert run(2, bf16, True)[1] == (False, 1, True)
    assert run(2, bf16, False)[1] == (True, 0, False)
