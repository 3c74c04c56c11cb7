"""Every torch optimizer under every preset, built before or after, against one plain process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import shardwise
from models import PRESETS, assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.errors import OptimizerError

ELEMENTWISE: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "Adagrad": {"lr": 0.05},
    "RMSprop": {"lr": 0.005, "momentum": 0.5, "centered": True},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "Adadelta": {"lr": 1.0},
    "ASGD": {"lr": 0.05},
    "Rprop": {"lr": 0.01},
}


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def train_pair(strategy: str, size: int, build: Any, before: bool, steps: int = 3) -> dict[str, torch.Tensor]:
    model, oracle = make(), make()
    opt = build(model) if before else None
    shardwise.fully_shard(model, strategy=strategy)
    opt = opt or build(model)
    ref = build(oracle)
    schedules = [lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)) for o in (opt, ref)]
    params = [list(g["params"]) for g in opt.param_groups]
    for step in range(steps):
        loss_of(model, batch(step, rank())).backward()
        loss_of(oracle, torch.cat([batch(step, r) for r in range(size)])).backward()
        for o, s in zip((opt, ref), schedules, strict=True):
            o.step()
            s.step()
            o.zero_grad()
        now = [list(g["params"]) for g in opt.param_groups]
        assert all(a is b for x, y in zip(params, now, strict=True) for a, b in zip(x, y, strict=True))
    assert_close(whole(model), whole(oracle), 2e-4)
    return whole(model)


def elementwise(size: int, name: str) -> None:
    """All presets, built before and after: the same bits; and close to one process."""
    kw = dict(ELEMENTWISE[name])

    def build(model):
        g = groups(model) if name != "Rprop" else [{"params": list(model.parameters())}]
        return getattr(torch.optim, name)(g, **kw)

    results = [train_pair(s, size, build, before=i % 2 == 0) for i, s in enumerate(PRESETS)]
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_on_slices(name):
    run(2, elementwise, 2, name)


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_foreach_and_fused(how):
    run(3, implementations, 3, how)


def implementations(size: int, how: dict[str, bool]) -> None:
    results = [
        train_pair(s, size, lambda m: torch.optim.AdamW(groups(m), lr=0.01, **how), before=False) for s in PRESETS
    ]
    for other in results[1:]:
        assert_same(other, results[0])


def whole_tensor(size: int, strategy: str) -> None:
    """Muon on the matrices and AdamW on the rest; then Adafactor on everything."""
    layout = strategy + ",layout=tensor"

    def matrices(m):
        return [p for n, p in m.named_parameters() if p.ndim == 2 and p.numel()]

    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=layout)
    opts = [
        [torch.optim.Muon(matrices(m), lr=0.02), torch.optim.AdamW([p for p in m.parameters() if p.ndim < 2], lr=0.01)]
        for m in (model, oracle)
    ]
    for step in range(3):
        loss_of(model, batch(step, rank())).backward()
        loss_of(oracle, torch.cat([batch(step, r) for r in range(size)])).backward()
        for pair in opts:
            for o in pair:
                o.step()
            for o in pair:
                o.zero_grad()
    # Muon orthogonalises in bf16: a last-bit difference of a gradient shows in the fourth digit
    assert_close(whole(model), whole(oracle), 2e-2)
    train_pair(layout, size, lambda m: torch.optim.Adafactor([p for p in m.parameters() if p.numel()], lr=0.01), True)


@pytest.mark.parametrize("strategy", PRESETS)
def test_optimizers_that_need_whole_tensors(strategy):
    run(2, whole_tensor, 2, strategy)
    if strategy == "zero3":
        run(4, whole_tensor, 4, "hsdp,shard_size=2")


def refused(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.numel()]
    before = whole(model)
    loss_of(model, batch(0, rank())).backward()
    for opt in (torch.optim.Muon(matrices), torch.optim.Adafactor(matrices)):
        with pytest.raises(OptimizerError, match="layout=tensor"):
            opt.step()
    with pytest.raises(OptimizerError, match="cannot train a sharded model"):
        torch.optim.LBFGS(model.parameters()).step(lambda: torch.tensor(0.0))
    assert_same(whole(model), before)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_what_cannot_work_says_so_before_the_first_step(strategy):
    run(2, refused, strategy)


def fused_sgd() -> None:
    model = make().bfloat16()
    shardwise.fully_shard(model, strategy="zero2")
    loss_of(model, batch(0, rank())).backward()
    with pytest.raises(OptimizerError, match="fused=False"):
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True).step()


def test_fused_sgd_below_fp32_is_refused():
    run(2, fused_sgd)


def added_group(strategy: str, size: int) -> None:
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.Adam(m.blocks.parameters(), lr=0.01) for m in (model, oracle)]
    for step in range(4):
        if step == 2:
            for m, o in zip((model, oracle), opts, strict=True):
                o.add_param_group({"params": list(m.head.parameters()), "lr": 0.1})
        loss_of(model, batch(step, rank())).backward()
        loss_of(oracle, torch.cat([batch(step, r) for r in range(size)])).backward()
        for m, o in zip((model, oracle), opts, strict=True):
            o.step()
            m.zero_grad()
    assert_close(whole(model), whole(oracle), 2e-4)


@pytest.mark.parametrize("strategy", PRESETS)
def test_group_added_mid_run(strategy):
    run(2, added_group, strategy, 2)


def resumed(strategy: str, size: int) -> None:
    """Momenta that exist before sharding, and a local state dict that goes out and in again."""
    model, oracle = make(), make()
    opts = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, oracle)]
    for m, o in zip((model, oracle), opts, strict=True):
        loss_of(m, batch(99, 0)).backward()
        o.step()
        o.zero_grad()
    shardwise.fully_shard(model, strategy=strategy)

    def step(k):
        loss_of(model, batch(k, rank())).backward()
        loss_of(oracle, torch.cat([batch(k, r) for r in range(size)])).backward()
        for o in opts:
            o.step()
            o.zero_grad()

    step(0)
    state = opts[0].state_dict()
    opts[0] = torch.optim.Adam(model.parameters(), lr=0.5)
    shardwise.attach(opts[0])
    opts[0].load_state_dict(state)
    step(1)
    assert_close(whole(model), whole(oracle), 2e-4)


@pytest.mark.parametrize("strategy", PRESETS)
def test_state_from_before_sharding_and_local_state_dict(strategy):
    run(2, resumed, strategy, 2)


def closures(strategy: str, size: int) -> None:
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, oracle)]
    for step in range(3):

        def closure(m, o, ids):
            o.zero_grad()
            loss = loss_of(m, ids)
            loss.backward()
            return loss

        opts[0].step(partial(closure, model, opts[0], batch(step, rank())))
        opts[1].step(partial(closure, oracle, opts[1], torch.cat([batch(step, r) for r in range(size)])))
    assert_close(whole(model), whole(oracle), 2e-4)


@pytest.mark.parametrize("strategy", PRESETS)
def test_step_with_a_closure(strategy):
    run(2, closures, strategy, 2)


def two_optimizers_one_group_by_hand(strategy: str, size: int) -> None:
    """Gradients set by the user are taken as they are."""
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, oracle)]
    for m, o in zip((model, oracle), opts, strict=True):
        for p in m.parameters():
            p.grad = torch.full(p.shape, 0.5)
        o.step()
    assert_close(whole(model), whole(oracle), 1e-6)


@pytest.mark.parametrize("strategy", PRESETS)
def test_gradients_set_by_hand(strategy):
    run(2, two_optimizers_one_group_by_hand, strategy, 2)
