"""The engine under DeepSpeed's calls, compared with one plain process."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import shardwise.deepspeed as deepspeed
from models import assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run

STEPS = 4


def settings(stage=0, gas=1, clip=0.0, micro=2, **more):
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
    }
    return config | more


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def engine_for(config, **kw):
    return deepspeed.initialize(model=make(**kw), optimizer=adamw, config=config)


def trained(config, steps=STEPS, plain=False, **kw):
    """Losses, norms and weights of a run by DeepSpeed's calls: ``gas`` micro-batches per step."""
    engine, *_ = engine_for(config, **kw)
    losses, norms = [], []
    gas = engine.gradient_accumulation_steps()
    for index in range(steps * gas):
        loss = loss_of(engine, batch(index, rank()))
        loss.backward() if plain else engine.backward(loss)
        assert engine.is_gradient_accumulation_boundary() == ((index + 1) % gas == 0)
        engine.step()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    assert (engine.global_steps, engine.micro_steps) == (steps, steps * gas)
    assert engine.global_samples == steps * 2 * gas * world()
    return losses, norms, whole(engine.module)


def alone(size, gas=1, clip=0.0, steps=STEPS, **kw):
    """The oracle: one plain process, the mean over ranks and micro-batches."""
    model = make(**kw)
    optimizer = adamw(model.parameters())
    norms = []
    for step in range(steps):
        for index in range(step * gas, (step + 1) * gas):
            for r in range(size):
                (loss_of(model, batch(index, r)) / size / gas).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, whole(model)


@pytest.mark.parametrize("gas", [1, 2, 3])
def test_every_stage_trains_like_one_process(gas):
    norms, weights = alone(2, gas, 0.5)
    by_stage = []
    for stage in range(4):
        one, other = run(2, trained, settings(stage, gas, 0.5))
        assert one[1] == other[1]
        assert one[1][gas - 1 :: gas] == pytest.approx(norms, rel=1e-5)
        assert_close(one[2], weights)
        by_stage.append(one)
    # Where micro-batches are summed before they are reduced, and where after, sums have another order.
    for one, other in pairwise(by_stage):
        if gas == 1 or one is not by_stage[1]:
            assert one[:2] == other[:2]
            assert_same(one[2], other[2])


def test_a_backward_of_the_script_counts_like_the_engines():
    for stage in range(4):
        ours = run(2, trained, settings(stage, 2, 0.5))
        plain = run(2, trained, settings(stage, 2, 0.5), STEPS, True)
        for one, other in zip(ours, plain, strict=True):
            assert one[:2] == other[:2]
            assert_same(one[2], other[2])
