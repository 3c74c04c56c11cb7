"""LocalSGD: ranks train on their own and are averaged from time to time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shardwise
from models import assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.accelerator import Accelerator
from shardwise.errors import StrategyError, UnitError
from shardwise.local_sgd import LocalSGD


def training(precision, every, steps, enabled=True):
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=every, cpu=True)
    model = make()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3))
    apart = []
    shardwise.reset_stats()
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=3 * every, enabled=enabled) as local_sgd:
        for k in range(steps):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch(k, rank())))
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()
                local_sgd.step()
            apart.append(float(model.head.weight.detach().float().sum()))
    sent = shardwise.stats().comm["reduce"].bytes_sent
    first = whole(model)
    accelerator.backward(loss_of(model, batch(99, rank())))  # behind the block gradients are the ranks' mean again
    with shardwise.gathered(model, grads=True):
        grad = model.head.weight.grad.clone()
    return first, apart, sent, grad, shardwise.expected(model).sent_per_step


def training_alone(size, every, steps):
    models = [make() for _ in range(size)]
    opts = [torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3) for m in models]

    def average():
        for params in zip(*(m.parameters() for m in models), strict=True):
            mean = sum(p.detach() for p in params) / size
            for p in params:
                p.data.copy_(mean)

    for k in range(steps):
        for r, (model, opt) in enumerate(zip(models, opts, strict=True)):
            (loss_of(model, batch(k, r)) / every).backward()
            if (k + 1) % every == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()
        if (k + 1) % (3 * every) == 0:
            average()
    average()
    first = copy.deepcopy(models[0])
    grads = []
    for r, model in enumerate(models):
        model.zero_grad()
        loss_of(model, batch(99, r)).backward()
        grads.append(model.head.weight.grad)
    return whole(first), sum(grads) / size


@pytest.mark.parametrize(("precision", "every"), [(None, 1), (None, 2), ("bf16", 1)])
def test_local_sgd(precision, every):
    steps, tol = 5 * every, 1e-5 if precision is None else 0.05
    results, (weights, grad) = run(2, training, precision, every, steps), training_alone(2, every, steps)
    for mine, _, _, my_grad, _ in results:
        assert_same(mine, results[0][0])
        assert_close(mine, weights, tol)
        if precision is None:
            torch.testing.assert_close(my_grad * every, grad, rtol=1e-3, atol=1e-5)
    sums = list(zip(*(apart for _, apart, _, _, _ in results), strict=True))
    assert sums[3 * every - 1][0] == sums[3 * every - 1][1], "the third step was followed by an average"
    assert sums[every - 1][0] != sums[every - 1][1], "the ranks trained apart"
    assert all(sent == 2 * results[0][4] for _, _, sent, _, _ in results), "two averages, and no reduce of gradients"


def refusing(preset):
    accelerator = Accelerator(strategy=preset, cpu=True)
    with pytest.raises(UnitError, match="not prepared"):
        LocalSGD(accelerator, make(), 2)
    model = accelerator.prepare(make())
    with pytest.raises(StrategyError, match="states are split"):
        LocalSGD(accelerator, model, 2)
    with pytest.raises(StrategyError, match="not a number of steps"):
        LocalSGD(accelerator, model, 0)
    with LocalSGD(accelerator, model, 2, enabled=False) as off:
        accelerator.backward(loss_of(model, batch(0, rank())))
        off.step()
    return True


@pytest.mark.parametrize("preset", ["zero1", "zero3"])
def test_what_it_refuses(preset):
    assert all(run(2, refusing, preset))


def test_one_process():
    first, _, _ = one()
    assert_close(first, training_alone(1, 1, 4)[0])


def one():
    accelerator = Accelerator(cpu=True)
    model = make()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3))
    with LocalSGD(accelerator, model, 2) as local_sgd:
        for k in range(4):
            accelerator.backward(loss_of(model, batch(k, 0)))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
            local_sgd.step()
    return whole(model), model, opt
