"""Every torch optimizer under every preset, built before or after, against one plain process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardwise
from models import PRESETS, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from scenarios import LM, Scenario, Side, compare, sgd, train
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


def scenario(build: Any, step: Any = train, **kw: Any) -> Scenario:
    return LM("", step=step, optimizer=build, **{"steps": 3, "tol": 2e-4, **kw})


def decayed(k: int) -> float:
    return 1 / (k + 1)


def same_bits(build: Any) -> None:
    """All presets, built before and after sharding: the same bits; and close to one process."""
    row = scenario(build, schedule=decayed)
    results = [compare(row, preset, before=i % 2 == 0)[0] for i, preset in enumerate(PRESETS)]
    for other in results[1:]:
        assert_same(other, results[0])


def elementwise(name: str) -> None:
    kind = getattr(torch.optim, name)
    same_bits(lambda m: kind(groups(m) if name != "Rprop" else list(m.parameters()), **ELEMENTWISE[name]))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_on_slices(name):
    run(2, elementwise, name)


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_foreach_and_fused(how):
    run(3, implementations, how)


def implementations(how: dict[str, bool]) -> None:
    same_bits(lambda m: torch.optim.AdamW(groups(m), lr=0.01, **how))


def muon_and_adamw(m: Any) -> list[torch.optim.Optimizer]:
    matrices = [p for p in m.parameters() if p.ndim == 2 and p.numel()]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW([p for p in m.parameters() if p.ndim < 2], lr=0.01)]


def whole_tensor(strategy: str) -> None:
    """Muon on the matrices and AdamW on the rest; then Adafactor on everything."""
    # Muon orthogonalises in bf16: a last-bit difference of a gradient shows in the fourth digit
    compare(scenario(muon_and_adamw, tol=2e-2), f"{strategy},layout=tensor")
    adafactor = scenario(lambda m: torch.optim.Adafactor([p for p in m.parameters() if p.numel()], lr=0.01))
    compare(adafactor, f"{strategy},layout=tensor", before=True)


@pytest.mark.parametrize("strategy", PRESETS)
def test_optimizers_that_need_whole_tensors(strategy):
    run(2, whole_tensor, strategy)
    if strategy == "zero3":
        run(4, whole_tensor, "hsdp,shard_size=2")


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


def adding_a_group(side: Side, step: int) -> None:
    if step == 2:
        side.optimizer.add_param_group({"params": list(side.model.head.parameters()), "lr": 0.1})
    side.backward(side.loss(step))
    side.update()
    side.model.zero_grad()


def with_momenta(m: Any) -> torch.optim.Optimizer:
    """Momenta that exist already."""
    optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
    loss_of(m, batch(99, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def resuming(side: Side, step: int) -> None:
    """A local state dict goes out and in again, into an optimizer with other settings."""
    if step == 1 and side.sharded:
        state = side.optimizer.state_dict()
        side.optimizers[0] = torch.optim.Adam(side.model.parameters(), lr=0.5)
        shardwise.attach(side.optimizer)
        side.optimizer.load_state_dict(state)
    train(side, step)


def by_closure(side: Side, step: int) -> None:
    def closure() -> torch.Tensor:
        side.optimizer.zero_grad()
        loss = side.loss(step)
        loss.backward()
        return loss

    side.optimizer.step(closure)


def by_hand(side: Side, step: int) -> None:
    """Gradients set by the script are taken as they are."""
    for p in side.model.parameters():
        p.grad = torch.full(p.shape, 0.5)
    side.update()


def adam_of_blocks(m: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(m.blocks.parameters(), lr=0.01)


ROWS = {
    "a group added mid-run": scenario(adam_of_blocks, adding_a_group, steps=4),
    "momenta from before, and a local state dict": scenario(with_momenta, resuming, steps=2),
    "a closure": scenario(sgd, by_closure),
    "gradients set by hand": scenario(sgd, by_hand, steps=1, tol=1e-6),
}


def compare_row(name: str, strategy: str) -> None:
    compare(ROWS[name], strategy, before="before" in name)


@pytest.mark.parametrize("strategy", PRESETS)
@pytest.mark.parametrize("name", ROWS)
def test_steps(name, strategy):
    run(2, compare_row, name, strategy)
