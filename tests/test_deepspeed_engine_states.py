"""States that wait on the host for a while, on the simulated device and on the CPU."""

from __future__ import annotations

import pytest
import torch

import shardwise.deepspeed as deepspeed
from models import adamw, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.errors import ConfigError, ShardwiseError, UnitError
from test_deepspeed_engine import settings


def step(engine, index):
    ids = batch(index, rank()).to(engine.device)
    engine.backward(loss_of(engine, ids))
    engine.step()


def on_device(engine):
    """Bytes of the engine's states that are not in host memory."""
    ledger = shardwise_engine(engine).ledger
    return sum(ledger.live.values()) - sum(ledger.on_host.values())


def shardwise_engine(engine):
    from shardwise.engine.hooks import engine_of

    return engine_of(engine.module)


def allocated(engine):
    return torch.accelerator.memory_allocated() if engine.device.type != "cpu" else 0


def sleeps(config, between):
    engine, *_ = deepspeed.initialize(model=make(), optimizer=adamw, config=config)
    engine.reload_states()  # nothing is away
    step(engine, 0)
    step(engine, 1)
    facts = {}
    if between == "all":
        before, counted = allocated(engine), on_device(engine)
        engine.offload_states()
        away, moved = on_device(engine), engine._asleep.nbytes
        facts["moved"] = before - allocated(engine), counted - away, moved
        ids = batch(2, rank()).to(engine.device)
        for use in (
            lambda: engine(ids[:, :-1]),
            lambda: engine.module.state_dict(),
            lambda: engine.module.head.weight.sum().item(),
            lambda: engine.optimizer.state_dict(),
            lambda: engine.optimizer.optimizer.step(),
            lambda: engine.save_checkpoint("nowhere"),
            engine.offload_states,
        ):
            with pytest.raises(UnitError, match="reload_states"):
                use()
        engine.reload_states()
        facts["back"] = on_device(engine) - away
    elif between == "optimizer":
        engine.offload_states(include=["optim_states", "hp_params"])
        with torch.no_grad():
            facts["loss"] = float(loss_of(engine, batch(2, rank()).to(engine.device)))
        engine.reload_states()
    elif between == "nothing":
        with torch.no_grad():
            facts["loss"] = float(loss_of(engine, batch(2, rank()).to(engine.device)))
    step(engine, 2)
    return {k: v.cpu() for k, v in whole(engine.module).items()}, facts


CONFIGS = {
    "0": settings(0), "2": settings(2), "3": settings(3), "3 in bf16": settings(3, bf16={"enabled": True}),
    "2 with state on the host": settings(2) | {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_states_on_the_host_and_back(name, simulated_device):
    config = CONFIGS[name]
    for device in ("cpu", "sim"):
        ones = run(2, sleeps, config, "nothing", device=device)
        for between in ("all", "optimizer"):
            found = run(2, sleeps, config, between, device=device)
            for (weights, facts), (right, plain) in zip(found, ones, strict=True):
                assert_same(weights, right)
                if between == "optimizer":
                    assert facts == plain
                else:
                    freed, counted, moved = facts["moved"]
                    assert facts["back"] == moved <= counted
                    assert freed >= moved or device == "cpu"
                    assert (moved > 0) == (device == "sim")


def wrong():
    engine, *_ = deepspeed.initialize(model=make(), optimizer=adamw, config=settings(2, 2))
    for arguments in ({"device": "nvme"}, {"include": ["everything"]}):
        with pytest.raises(ConfigError):
            engine.offload_states(**arguments)
    engine.backward(loss_of(engine, batch(0, rank())))
    with pytest.raises(UnitError, match="gradients wait"):
        engine.offload_states()
    engine.zero_grad()
    engine.offload_states()
    with pytest.raises(ShardwiseError, match="reload_states"):
        engine(batch(0, rank())[:, :-1])
    engine.reload_states()
    step(engine, 0)
    return True


def test_when_states_cannot_leave():
    assert all(run(2, wrong))
