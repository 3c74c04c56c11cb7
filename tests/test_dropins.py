"""Scripts written for torch's DDP and FSDP run with only the import changed."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import shardwise
from models import adamw, assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.engine.hooks import engine_of
from shardwise.errors import ConfigError, StrategyError


def ddp_script(DDP, ids_of) -> dict[str, torch.Tensor]:
    """What people write for torch DDP; the class is the only difference."""
    model = make()
    ddp = DDP(model, find_unused_parameters=True)
    opt = adamw(ddp.parameters())
    for step in range(3):
        with ddp.no_sync():
            loss_of(ddp, ids_of(2 * step)).backward()
        loss_of(ddp, ids_of(2 * step + 1)).backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
    assert ddp.module is model
    ddp.eval()
    with torch.no_grad():
        ddp(ids_of(0)[:, :-1])
    return {k: v.clone() for k, v in ddp.module.state_dict().items()}


def ddp_both(strategy: str | None) -> None:
    ids_of = lambda step: batch(step, rank())  # noqa: E731
    torch_result = ddp_script(nn.parallel.DistributedDataParallel, ids_of)
    ours = lambda m, **kw: shardwise.DistributedDataParallel(m, strategy=strategy, **kw)  # noqa: E731
    assert_close(ddp_script(ours, ids_of), torch_result, 2e-5)


@pytest.mark.parametrize("strategy", [None, "zero1", "zero2", "zero3"])
def test_ddp_script(strategy):
    run(2, ddp_both, strategy)


def fsdp_script(FSDP, wrap) -> dict[str, torch.Tensor]:
    model = wrap(FSDP, make(odd=False))
    opt = adamw(model.parameters())
    for step in range(3):
        loss_of(model, batch(step, rank())).backward()
        model.clip_grad_norm_(0.5)
        opt.step()
        opt.zero_grad()
    with FSDP.summon_full_params(model):
        return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}


def fsdp_both() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as Torch

    def theirs(F, m):
        for i, b in enumerate(m.blocks):
            m.blocks[i] = F(b, use_orig_params=True, device_id=torch.device("cpu"))
        return F(m, use_orig_params=True, device_id=torch.device("cpu"))

    expected = fsdp_script(Torch, theirs)
    got = fsdp_script(shardwise.FullyShardedDataParallel, lambda F, m: F(m, use_orig_params=True))
    assert_close({k.removeprefix("module."): v for k, v in got.items()}, expected, 2e-5)


def test_fsdp_script():
    run(2, fsdp_both)


def wrapper_details() -> None:
    model = make()
    wrapped = shardwise.DistributedDataParallel(model, strategy="zero3", device_ids=None, static_graph=True)
    plain = make()
    assert wrapped.state_dict().keys() == plain.state_dict().keys(), "original names"
    assert_same(whole(wrapped), whole(plain))
    wrapped.load_state_dict({f"module.{k}": v for k, v in make(seed=4).state_dict().items()})
    assert_same(whole(wrapped), whole(make(seed=4)))
    assert wrapped.blocks is model.blocks, "attributes of the module show through"
    with pytest.raises(AttributeError):
        _ = wrapped.no_such_thing
    with pytest.raises(ConfigError, match="mixed_precision"):
        shardwise.FullyShardedDataParallel(make(), mixed_precision=object())
    with pytest.raises(StrategyError, match="process_group"):
        shardwise.DistributedDataParallel(make(), process_group=object())


def test_wrapper_details():
    run(2, wrapper_details)


def overridden() -> None:
    """What the launcher says wins over the script, whatever the door."""
    os.environ["SHARDWISE_STRATEGY"] = "zero1"
    try:
        for model in (shardwise.DistributedDataParallel(make()), shardwise.fully_shard(make(), strategy="zero3")):
            assert engine_of(model).strategy == shardwise.Strategy("zero1")
        os.environ["SHARDWISE_MIXED_PRECISION"] = "bf16"
        model = shardwise.fully_shard(make(), strategy="zero3")
        assert model.head.weight.dtype == torch.bfloat16
    finally:
        os.environ.pop("SHARDWISE_STRATEGY")
        os.environ.pop("SHARDWISE_MIXED_PRECISION", None)


def test_the_launchers_strategy_wins():
    run(2, overridden)


def keyword_forward() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, *parts: torch.Tensor, scale: float, extra: dict[str, torch.Tensor], flag: bool = False):
            return {"y": self.lin(sum(parts)) * scale + extra["b"], "flag": flag}

    torch.manual_seed(0)
    model = shardwise.FullyShardedDataParallel(Sum())
    out = model(torch.ones(2, 4), torch.ones(2, 4), scale=2.0, extra={"b": torch.ones(4)}, flag=True)
    out["y"].sum().backward()
    assert out["flag"] is True and model.lin.weight.grad is not None


def test_forward_takes_any_arguments():
    run(2, keyword_forward)
    keyword_forward()
