"""Units that are not listened to: whatever a script does with them, gradients are those of units that are."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import shardwise
from models import assert_close, assert_same, rank, whole, world
from ranks import run
from shardwise.comm import joined
from shardwise.engine.hooks import engine_of
from slowly import slow

D, N = 8, 8
SOME = 3 * 4 * 160  # bytes: about three blocks go into one message
QUIET = ("ddp", "zero1", "zero2")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Chain(nn.Module):
    """Blocks, which run in the order of ``way``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(N))
        self.head = nn.Linear(D, D)
        self.way = list(range(N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in self.way:
            x = self.blocks[k](x)
        return self.head(x)


def rows(step: int, of: int) -> torch.Tensor:
    return torch.randn(3, D, generator=torch.Generator().manual_seed(100 * step + of))


def in_order(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    model(x).square().mean().backward()


def backwards(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    model.way = list(range(N))[::-1]
    in_order(model, x, step, mine)


def mixed(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    """What was seen as over is used again by the first block of all; others are idle."""
    model.way = [N - 1, 2, 5, 0, N - 1, 3, 1]
    in_order(model, x, step, mine)


def changing(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    model.way = [k for k in range(N) if k != step] if step % 2 else list(range(N))[::-1]
    in_order(model, x, step, mine)


def penalty(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    """A backward that no forward came before, of one rank's own numbers, and then one that adds to it."""
    (mine * sum(p.square().sum() for p in model.blocks[1].parameters())).backward()
    in_order(model, x, step, mine)


def penalty_after(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    in_order(model, x, step, mine)
    (mine * sum(p.square().sum() for p in model.parameters())).backward()


def by_itself(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    model.blocks[1](model.blocks[4](x)).square().mean().backward()


def double(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    """The gradient of a gradient's norm."""
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    grad.square().mean().backward()


def accumulating(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    for half in (x, x * 2):
        in_order(model, half, step, mine)


def failing(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    """A backward that breaks off in the middle leaves nothing."""

    def fail(_grad: torch.Tensor) -> None:
        raise MemoryError

    hook = model.blocks[3].register_forward_hook(lambda m, a, out: out.register_hook(fail) and None)
    with pytest.raises(MemoryError):
        in_order(model, x, step, mine)
    hook.remove()
    if engine_of(model) is not None:
        assert all(p.grad is None for p in model.parameters())
    model.zero_grad()
    in_order(model, x, step, mine)


def unused_gradients(model: Any, x: torch.Tensor, step: int, mine: float) -> None:
    """Gradients that are only looked at are not left anywhere."""
    torch.autograd.grad(model(x).square().mean(), list(model.blocks[2].parameters()))
    for p in model.parameters():
        p.grad = None
    in_order(model, x, step, mine)


WAYS = [
    in_order, backwards, mixed, changing, penalty, penalty_after, by_itself, double, accumulating, failing,
    unused_gradients,
]  # fmt: skip


def trained(strategy: str, way: Any, limit: int = SOME) -> tuple[dict[str, torch.Tensor], list[int], list[int]]:
    """Weights after some steps, how many reduces each took, and which blocks are listened to at the end.

    Args:
        limit: bytes of a message. With 0 each unit has its own, and all are listened to.
    """
    torch.manual_seed(0)
    model, calls = Chain(), list[int]()
    with mock.patch.object(joined, "JOINED_BYTES", limit):
        shardwise.fully_shard(model, strategy=strategy, units=Block)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(5):
            shardwise.reset_stats()
            way(model, rows(step, rank()), step, 0.01 * (1 + rank()))
            calls.append(shardwise.stats().comm["reduce"].calls)
            optimizer.step()
            optimizer.zero_grad()
    heard = [k for k, block in enumerate(model.blocks) if block._forward_hooks]
    return whole(model), calls, heard


@pytest.mark.parametrize("strategies", [("ddp", "zero2"), slow(("zero1",))])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_units_that_are_listened_to(way: Any, strategies: tuple[str, ...]) -> None:
    loud = run(2, trained, "ddp", way, 0)[0][0]
    for strategy in strategies:
        for values, _, heard in run(2, trained, strategy, way):
            assert_same(values, loud)
            assert len(heard) < N, "not all of them are listened to"


@pytest.mark.parametrize("way", [mixed, failing, *map(slow, (in_order, penalty, double))])
def test_three_ranks(way: Any) -> None:
    loud = run(3, trained, "ddp", way, 0)[0][0]
    for values, _, _ in run(3, trained, "ddp", way):
        assert_same(values, loud)


def means(way: Any) -> None:
    """On one process: the mean of what each rank's rows give."""
    torch.manual_seed(0)
    model = shardwise.fully_shard(Chain(), strategy="ddp", units=Block)
    way(model, rows(0, rank()), 0, 0.01 * (1 + rank()))
    grads = {n: p.grad + 0 for n, p in model.named_parameters() if p.grad is not None}
    total: dict[str, torch.Tensor] = {}
    for of in range(world()):
        torch.manual_seed(0)
        plain = Chain()
        way(plain, rows(0, of), 0, 0.01 * (1 + of))
        for n, p in plain.named_parameters():
            if p.grad is not None:
                total[n] = total.get(n, 0) + p.grad / world()
    assert_close(grads, total, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_they_are_the_mean_of_all_ranks(way: Any) -> None:
    run(2, means, way)


def test_what_is_seen_as_over_too_early_is_listened_to_from_then_on() -> None:
    for strategy in QUIET:
        _, usual, few = run(2, trained, strategy, in_order)[0]
        assert len(set(usual)) == 1, "as many messages in each step"
        _, calls, heard = run(2, trained, strategy, backwards)[0]
        assert calls[-1] <= calls[0] and calls[-1] <= usual[-1] + 1, "nothing is reduced twice for good"
        assert len(few) <= len(heard) < N


def copied() -> None:
    """A copy listens to whom its original does, and trains alike."""
    with mock.patch.object(joined, "JOINED_BYTES", SOME):
        torch.manual_seed(0)
        model = shardwise.fully_shard(Chain(), strategy="ddp", units=Block)
        twin = copy.deepcopy(model)
        for m in (model, twin):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
            for step in range(3):
                mixed(m, rows(step, rank()), step, 0.0)
                optimizer.step()
                optimizer.zero_grad()
    assert_same(whole(model), whole(twin))
    ours, theirs = (
        {k: [u.name for u in us] for k, us in engine_of(m).backward.listening.silent.items()} for m in (model, twin)
    )
    assert ours == theirs


def test_a_copy_listens_alike() -> None:
    run(2, copied)


def nested() -> None:
    """Parts that were sharded, and trained, before the whole was."""
    torch.manual_seed(0)
    model = Chain()
    for block in model.blocks:
        shardwise.fully_shard(block, strategy="ddp")
    model.blocks[0](rows(0, rank())).sum().backward()
    for p in model.parameters():
        p.grad = None
    shardwise.fully_shard(model, strategy="ddp")
    in_order(model, rows(0, rank()), 0, 0.0)
    grads = {n: p.grad + 0 for n, p in model.named_parameters()}
    total: dict[str, Any] = {}
    for of in range(world()):
        torch.manual_seed(0)
        plain = Chain()
        in_order(plain, rows(0, of), 0, 0.0)
        for n, p in plain.named_parameters():
            total[n] = total.get(n, 0) + p.grad / world()
    assert_close(grads, total, 1e-5)


def test_parts_that_were_sharded_before_the_whole() -> None:
    run(2, nested)
