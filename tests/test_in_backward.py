"""``optimizer_in_backward``: the bits of a step after the backward, without its memory."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, train, whole
from ranks import run
from shardwise.errors import GradientError, OptimizerError, UnitError, UpdateFailed
from slowly import slow
from test_offload import at, every, homes_for, separate_memory

HOMES = ("device", "cpu", "nvme")
AWAY = [f"offload_params={p},offload_optimizer={o}" for p, o in product(HOMES, HOMES)]
ASK = ",optimizer_in_backward=true"
SIZES = {"d": 64, "vocab": 97, "odd": False}


def attached(optimizer: Any, params: Any) -> torch.optim.Optimizer:
    made = optimizer(params)
    shardwise.attach(made)
    return made


def pairs(strategies: list[str], path: str, homes: list[str], kw: dict[str, Any], every: bool = True) -> None:
    optimizer = kw.pop("optimizer", adamw)
    for index, strategy in enumerate(strategies):
        plain = train(strategy, clip=None, optimizer=optimizer, **kw)
        for home in homes_for(index, homes, every):
            losses, _, weights = train(
                at(strategy + ASK, home, path), clip=None, optimizer=partial(attached, optimizer), **kw
            )
            assert losses == plain[0], (strategy, home)
            assert_same(weights, plain[2])


ON = {1: ["ddp", "zero3"], 2: PRESETS, 4: ["zero2", "hsdp,shard_size=2"]}


@pytest.mark.parametrize(("world", "every"), [*((world, False) for world in ON), slow(2, True)])
def test_same_bits(world, every, tmp_path):
    homes = AWAY if world == 2 else [AWAY[0], AWAY[-1]]
    run(world, pairs, ON[world], str(tmp_path), homes, {"steps": 3}, every or world != 2)


def test_same_bits_in_half_precision_and_tied(tmp_path):
    homes = [AWAY[0], AWAY[4], AWAY[-1]]
    run(2, pairs, [s + ",param_dtype=bf16" for s in ("ddp", "zero1", "zero3")], str(tmp_path), homes, {"steps": 3})
    run(2, pairs, ["zero2", "zero3"], str(tmp_path), homes, {"steps": 3, "tied": True})


def test_same_bits_with_one_tensor_per_parameter(tmp_path):
    muon_like = {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "steps": 3}
    run(2, pairs, ["zero3,layout=tensor", "zero1,layout=tensor"], str(tmp_path), [AWAY[0], AWAY[-1]], muon_like)


def over_the_link(path: str, every: bool) -> None:
    with separate_memory():
        pairs(["zero3", "zero1"], path, AWAY[1:], {"steps": 3}, every)


@every
def test_same_bits_when_gradients_are_copied_to_the_host(every, tmp_path):
    run(2, over_the_link, str(tmp_path), every)


# --- a longer story -----------------------------------------------------------------------------------
class Branches(nn.Module):
    """Units that some steps, or some ranks, leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24)) for _ in range(4))

    def forward(self, x: torch.Tensor, use: list[int]) -> torch.Tensor:
        for i in use:
            x = x + self.blocks[i](x)
        return x


def story(strategy: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Branches()
    model.blocks[0].requires_grad_(False)
    shardwise.fully_shard(model, strategy=strategy)
    opts = [
        torch.optim.AdamW([{"params": model.blocks[a:b].parameters()} for a, b in ((0, 2), (2, 3))], lr=0.01),
        torch.optim.SGD(model.blocks[3].parameters(), lr=0.1, momentum=0.9),
    ]  # fmt: skip
    schedule = lr_scheduler.LambdaLR(opts[0], [lambda k: 1 / (k + 1), lambda k: 0.0 if k == 1 else 1.0])
    for opt in opts:
        shardwise.attach(opt)
    mine = 1 + rank() if "zero3" not in strategy else 1  # a branch of this rank's own
    uses = [[0, 1, 2, 3], [0, 1, 1, 3], [3, 2, 1, 0], [mine, 3], [0, 1, 2, 3]]
    for step, use in enumerate(uses):
        torch.manual_seed(10 * step + rank())
        model(torch.randn(3, 24), use).square().mean().backward()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=step % 2 == 0)
        schedule.step()
        with torch.no_grad():
            model(torch.ones(1, 24), [0, 1])
    return whole(model)


def stories(path: str) -> None:
    for strategy, homes in (("ddp", AWAY), ("zero2", AWAY[:3]), ("zero3", AWAY)):
        plain = story(strategy)
        for home in (homes[0], homes[-1]):
            assert_same(story(at(strategy + ASK, home, path)), plain)


def test_branches_groups_schedules_and_frozen_units(tmp_path):
    run(2, stories, str(tmp_path))


def with_accelerator(strategy: str) -> dict[str, torch.Tensor]:
    accelerator = shardwise.Accelerator(cpu=True, strategy=strategy)
    model = make()
    model, opt = accelerator.prepare(model, adamw(model.parameters()))
    for k in range(3):
        accelerator.backward(loss_of(model, batch(k, rank())))
        opt.step()
        opt.zero_grad()
    return whole(model)


def accelerators() -> None:
    assert_same(with_accelerator("zero3" + ASK), with_accelerator("zero3"))


def test_through_an_accelerator():
    run(2, accelerators)


def uneven(strategy: str) -> dict[str, torch.Tensor]:
    accelerator = shardwise.Accelerator(cpu=True, strategy=strategy)
    model = make()
    model, opt = accelerator.prepare(model, adamw(model.parameters()))
    with accelerator.join_uneven_inputs([model]):
        for k in range(2 + 2 * rank()):
            accelerator.backward(loss_of(model, batch(k, rank())))
            opt.step()
            opt.zero_grad()
    return whole(model)


def uneven_pairs() -> None:
    for preset in ("ddp", "zero3"):
        assert_same(uneven(preset + ASK), uneven(preset))


def test_uneven_inputs():
    run(2, uneven_pairs)


# --- memory -------------------------------------------------------------------------------------------
def gradient_bytes(strategy: str, layers: int) -> tuple[int, int]:
    model = shardwise.fully_shard(make(layers=layers, **SIZES), strategy=strategy)
    opt = adamw(model.parameters())
    shardwise.attach(opt)
    for k in range(3):
        if k == 2:
            shardwise.reset_stats(model)
        loss_of(model, batch(k, rank())).backward()
        opt.step()
        opt.zero_grad()
    return shardwise.stats(model).peak["gradients"], 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
def test_gradients_of_two_units_exist_at_a_time(strategy):
    for layers in (4, 12):
        for peak, everything in run(2, gradient_bytes, strategy + ASK, layers):
            parts = 2 if strategy == "zero3" else 1
            unit, root = 4 * (2 * 3 * 64 * 64 + 6 * 64 + 2) // parts, 4 * (2 * 97 * 64 + 2 * 64) // parts
            assert 0.99 * unit < peak <= 1.05 * (2 * unit + root) < everything // parts


# --- what cannot be had --------------------------------------------------------------------------------
def sharded(strategy: str = "zero3" + ASK, **kw: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = shardwise.fully_shard(make(**kw), strategy=strategy)
    opt = adamw(model.parameters())
    shardwise.attach(opt)
    return model, opt


def refusals() -> None:
    model, opt = sharded()
    loss_of(model, batch(0, rank())).backward()
    p = model.head.weight
    assert p.grad is not None and "used up" in repr(p.grad)
    for look in (
        lambda: shardwise.clip_grad_norm_(model, 1.0), lambda: shardwise.clip_grad_value_(model, 1.0),
        lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), lambda: p.grad.mul_(2),
        lambda: loss_of(model, batch(0, rank())).backward(),
    ):  # fmt: skip
        with pytest.raises(GradientError, match="its update took place during the backward"):
            look()
    opt.step()
    opt.zero_grad(set_to_none=False)
    loss_of(model, batch(1, rank())).backward()
    opt.step()
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UnitError, match="create_graph"):
        loss_of(model, batch(2, rank())).backward(create_graph=True)


def test_whatever_needs_all_gradients_says_so():
    run(2, refusals)


def test_an_optimizer_nobody_attached():
    model = shardwise.fully_shard(make(), strategy="zero3" + ASK)
    opt = adamw(model.parameters())
    with pytest.raises(OptimizerError, match=r"shardwise\.attach"):
        loss_of(model, batch(0, 0)).backward()
    shardwise.attach(opt)
    loss_of(model, batch(0, 0)).backward()


class Reentrant(nn.Module):
    """Its first unit is used first and last, each time in a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 1, 2, 3, 0):
            x = F.gelu(checkpoint(self.blocks[i], x, use_reentrant=True))
        return x


def test_a_second_gradient_after_the_update_is_an_error():
    model = shardwise.fully_shard(Reentrant(), strategy="zero3" + ASK)
    opt = adamw(model.parameters())
    shardwise.attach(opt)

    def steps() -> None:
        for _ in range(2):  # the first one learns the order of the units
            model(torch.randn(2, 8, requires_grad=True)).sum().backward()
            opt.step()
            opt.zero_grad()

    with pytest.raises(UnitError, match="second gradient in one backward"):
        steps()


@pytest.mark.parametrize("preset", ["ddp", "zero2"])
def test_accumulation_is_refused(preset):
    accelerator = shardwise.Accelerator(cpu=True, strategy=preset + ASK, gradient_accumulation_steps=2)
    model = make()
    model, opt = accelerator.prepare(model, adamw(model.parameters()))

    def micro_batches() -> None:
        for k in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch(k, 0)))
                opt.step()
                opt.zero_grad()

    with pytest.raises(GradientError, match="optimizer_in_backward"):
        micro_batches()


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        raise ValueError("boom")


def test_a_backward_that_fails_half_way_is_not_passed_over_in_silence(tmp_path):
    model, opt = sharded(at("zero3" + ASK, AWAY[-1], str(tmp_path)), layers=6)
    loss_of(model, batch(0, 0)).backward()  # shows the order of the units
    opt.step()
    opt.zero_grad()
    hook = model.blocks[0].register_forward_hook(lambda m, a, out: Boom.apply(out))
    with pytest.raises(ValueError, match="boom"):
        loss_of(model, batch(0, 0)).backward()
    hook.remove()
    for use in (model.state_dict, lambda: model(batch(0, 0)), opt.step, opt.state_dict):
        with pytest.raises(UpdateFailed, match="updates by AdamW had taken place"):
            use()
    model.load_state_dict(make(layers=6).state_dict())
    with pytest.raises(UpdateFailed):  # its optimizer is as it was
        loss_of(model, batch(0, 0)).backward()
    del use, opt
    opt = attached(adamw, model.parameters())
    loss_of(model, batch(0, 0)).backward()
    opt.step()
