"""Which optimizers may step on what: their own ``step`` decides, and what they do outside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import shardwise
from models import PRESETS, assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.engine import elementwise
from shardwise.errors import OptimizerError, UpdateFailed
from slowly import in_turn
from test_offload import at


@contextmanager
def known(*names: str) -> Iterator[None]:
    with mock.patch.object(elementwise, "ELEMENTWISE", {*elementwise.ELEMENTWISE, *names}):
        yield


class LARS(torch.optim.SGD):
    """Scales each gradient by norms of its whole tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None and p.numel()):
            p.grad.mul_((p.norm() + 1e-3) / (p.grad.norm() + 1e-3))
        return super().step(closure)


class Centralised(torch.optim.AdamW):
    """Takes the mean over all dims but the first out of each gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None and p.grad.ndim > 1):
            if p.numel():
                p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.grad.ndim)), keepdim=True))
        return super().step(closure)


class Doubled(torch.optim.SGD):
    """Works element by element, but nobody can tell from outside."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            p.grad.mul_(2)
        return super().step(closure)


class Renamed(torch.optim.SGD):
    """Adds nothing to a step."""


class Sums(torch.optim.Optimizer):
    """One number in the group depends on all gradients, as in Prodigy."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "d": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            group["d"] = 1.0 / (1.0 + sum(float(g.square().sum()) for g in grads))
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * group["d"])


class Prodigy(Sums):
    """Known by its name."""


def compare(strategy: str, size: int, build: Callable[[Any], torch.optim.Optimizer], steps: int = 3) -> Any:
    """Train beside one plain process on everybody's batches."""
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [build(m.parameters()) for m in (model, oracle)]
    for step in range(steps):
        loss_of(model, batch(step, rank())).backward()
        loss_of(oracle, torch.cat([batch(step, r) for r in range(size)])).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    assert_close(whole(model), whole(oracle), 2e-4)
    return model, opts[0]


def lars(params: Any) -> torch.optim.Optimizer:
    return LARS(params, lr=0.05, momentum=0.9)


def centralised(params: Any) -> torch.optim.Optimizer:
    return Centralised(params, lr=0.01)


def doubled(params: Any) -> torch.optim.Optimizer:
    return Doubled(params, lr=0.05, momentum=0.9)


def subclasses(strategy: str, size: int) -> None:
    for build in (lars, centralised, doubled):
        if size > 1:
            with pytest.raises(OptimizerError, match=r"layout=tensor(.|\n)*ELEMENTWISE.add\('"):
                compare(strategy, size, build, 1)
        else:  # one rank's pieces are whole
            compare(strategy, size, build)
        compare(strategy + ",layout=tensor", size, build)
    compare(strategy, size, lambda params: Renamed(params, lr=0.05, momentum=0.9))
    with known("Doubled"):
        compare(strategy, size, doubled)


@in_turn(world=[1, 2], strategy=PRESETS)
def test_a_step_of_its_own_is_not_that_of_its_base(strategy, world):
    run(world, subclasses, strategy, world)


def test_a_class_with_the_name_of_one_of_torchs_is_not_torchs():
    own = type("AdamW", (torch.optim.Optimizer,), {"step": Sums.step, "__module__": "mine"})
    opt = own([nn.Parameter(torch.ones(2))], {"lr": 0.1})
    assert elementwise.needs_whole_tensors(opt)
    with known("mine.AdamW"):
        assert not elementwise.needs_whole_tensors(opt)


def sums(strategy: str, size: int) -> None:
    tensor = strategy + ",layout=tensor"
    if strategy == "ddp":  # each rank has all of them
        compare(tensor, size, Sums)
        compare(tensor, size, Prodigy)
        return
    with pytest.raises(OptimizerError, match="depends on sums over all parameters"):
        compare(tensor, size, Prodigy, 1)
    model = shardwise.fully_shard(make(), strategy=tensor)
    opt = Sums(model.parameters())
    loss_of(model, batch(0, rank())).backward()
    with pytest.raises(OptimizerError, match=r"differ between rank 0 and rank 1 \('d'\)"):
        opt.step()
    with pytest.raises(UpdateFailed, match="differ between rank 0 and rank 1"):
        loss_of(model, batch(0, rank()))


@pytest.mark.parametrize("strategy", PRESETS)
def test_sums_over_all_parameters_are_whole_or_refused(strategy):
    run(2, sums, strategy, 2)


def on_one_rank() -> None:
    compare("zero2", 1, Sums)
    compare("ddp", 1, Prodigy)


def test_one_rank_has_all_parameters():
    run(1, on_one_rank)


# --- methods other than step ---------------------------------------------------------------------------
class ScheduleFree(torch.optim.Optimizer):
    """Defazio et al. 2024, with SGD: parameters are ``y`` while training and the average ``x`` in between."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def eval(self) -> None:
        self._mix(False, lambda group: 1 - 1 / group["beta"])

    @torch.no_grad()
    def train(self) -> None:
        self._mix(True, lambda group: 1 - group["beta"])

    def _mix(self, train: bool, weight: Any) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group))
                group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            group["k"] += 1
            share, lr = 1 / group["k"], group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, share).add_(p.grad, alpha=lr * (group["beta"] * (1 - share) - 1))
                    z.sub_(p.grad, alpha=lr)


def schedule_free(strategy: str | None, size: int) -> list[Any]:
    """Losses and weights in both modes, with an evaluation in the middle. ``None``: plain, on everybody's batches."""
    model = make()
    if strategy is not None:
        shardwise.fully_shard(model, strategy=strategy)

    def ids(step: int) -> torch.Tensor:
        return batch(step, rank()) if strategy is not None else torch.cat([batch(step, r) for r in range(size)])

    opt = ScheduleFree(model.parameters())
    seen: list[Any] = []
    for step in range(4):
        opt.train()
        loss_of(model, ids(step)).backward()
        opt.step()
        if step != 2:
            opt.zero_grad()
        if step % 2:
            opt.eval()
            with torch.no_grad():
                seen += [loss_of(model, batch(99, 0)).item(), whole(model)]
    opt.train()
    seen.append(whole(model))
    return seen


def schedule_free_pairs(path: str, size: int, strategies: list[str], homes: list[str]) -> None:
    with known("ScheduleFree"):
        plain, first = schedule_free(None, size), {}
        for strategy in strategies:
            tolerance = 5e-2 if "bf16" in strategy else 2e-4
            for home in homes:
                mine = schedule_free(at(strategy, home, path), size)
                if strategy.endswith("bf16"):
                    torch.testing.assert_close(mine[:4:2], plain[:4:2], rtol=tolerance, atol=tolerance)
                for a, b, c in zip(mine, plain, first.setdefault("bf16" in strategy, mine), strict=True):
                    if isinstance(a, dict):
                        assert_close(a, b, tolerance)
                        assert_same(a, c)
                    else:
                        assert a == pytest.approx(b, abs=tolerance)


@in_turn(world=[1, 2], dtype=["", ",param_dtype=bf16"])
def test_methods_that_read_state_see_pieces_and_values_follow(world, dtype, tmp_path):
    strategies = [s + dtype for s in (PRESETS if world == 2 else ["ddp", "zero3"])]
    homes = ["device", "cpu", "nvme", "offload_params=nvme,offload_optimizer=nvme"]
    run(world, schedule_free_pairs, str(tmp_path), world, strategies, homes)


def through_an_accelerator(strategy: str) -> Any:
    with known("ScheduleFree"):
        accelerator = shardwise.Accelerator(cpu=True, strategy=strategy)
        model = make()
        model, opt = accelerator.prepare(model, ScheduleFree(model.parameters()))
        for step in range(2):
            opt.train()
            accelerator.backward(loss_of(model, batch(step, rank())))
            opt.step()
            opt.zero_grad()
        before = whole(model)
        opt.eval()
        return before, whole(model)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_an_accelerators_optimizer_reaches_them(strategy):
    for before, after in run(2, through_an_accelerator, strategy):
        assert not torch.equal(before["head.weight"], after["head.weight"])


def forgotten_mode(strategy: str) -> None:
    """An optimizer that raises before it changes anything has not failed, at its first step or later."""
    with known("ScheduleFree"):
        model = shardwise.fully_shard(make(), strategy=strategy)
        opt = ScheduleFree(model.parameters())
        before = whole(model)
        for _ in range(2):
            for _ in range(2):
                loss_of(model, batch(0, rank())).backward()
                with pytest.raises(RuntimeError, match="not in train mode"):
                    opt.step()
                opt.zero_grad()
                assert_same(whole(model), before)
                assert [id(p) for g in opt.param_groups for p in g["params"]] == [id(p) for p in model.parameters()]
                assert all(p.grad is None for p in model.parameters() if p.numel())
            opt.train()
            loss_of(model, batch(0, rank())).backward()
            opt.step()
            opt.zero_grad()
            opt.eval()
            before = whole(model)


@pytest.mark.parametrize("strategy", PRESETS)
def test_a_step_that_raises_before_it_changes_anything_is_no_failure(strategy):
    run(2, forgotten_mode, strategy)


# --- optimizers around others ----------------------------------------------------------------------------
class Ascent(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021) as usual: two methods, a base that shares the groups."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base = base(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None and p.numel()]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=float(0.05 / norm))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for g in self.param_groups for p in g["params"]):
            if "old" in self.state[p]:
                p.copy_(self.state[p]["old"])
        self.base.step()


class Slow(torch.optim.Optimizer):
    """Lookahead (Zhang et al. 2019): every second step moves slow weights towards those of the optimizer inside."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups, self.taken = inner, inner.param_groups, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss, self.taken = self.inner.step(closure), self.taken + 1
        for p in (p for g in self.param_groups for p in g["params"]):
            slow = self.state[p].setdefault("slow", p.clone())
            if self.taken % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))
        return loss


def around_others(strategy: str, size: int, early: bool) -> None:
    models = [make(), make()]
    shardwise.fully_shard(models[0], strategy=strategy)
    slow = [Slow(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)) for m in models]
    ascents = [Ascent(m.parameters(), lambda groups: torch.optim.SGD(groups, lr=0.1)) for m in models]
    if early:
        shardwise.attach(slow[0].inner)
        shardwise.attach(ascents[0])
    for step in range(4):
        ids = [batch(step, rank()), torch.cat([batch(step, r) for r in range(size)])]
        for m, o, mine in zip(models, slow, ids, strict=True):
            loss_of(m, mine).backward()
            o.step()
            o.zero_grad()
    for step in range(2 if "ddp" in strategy or size == 1 else 0):  # its norm is one over all parameters
        ids = [batch(step, rank()), torch.cat([batch(step, r) for r in range(size)])]
        for m, o, mine in zip(models, ascents, ids, strict=True):
            for method in (o.first_step, o.second_step):
                loss_of(m, mine).backward()
                method()
                o.zero_grad()
    assert_close(whole(models[0]), whole(models[1]), 5e-4)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("strategy", PRESETS)
def test_optimizers_around_others(strategy, early):
    run(1, around_others, strategy, 1, early)
    run(2, around_others, strategy + ",layout=tensor", 2, early)
