"""All ranks issue the same collectives in the same order, whatever gradients arrive: over one communicator per device
(as on NCCL) anything else is a deadlock. gloo's tags would forgive it, so the order itself is recorded here."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardwise
from models import rank
from ranks import run
from shardwise.comm.group import Group
from test_values_that_go import Auxiliary, D, Idle, Passing, rows


@contextmanager
def recorded():
    """The collectives that this rank issues, in order: what, and of which unit."""
    issued: list[str] = []
    real = Group._count

    def count(self: Group, op: Any, nbytes: int) -> None:
        if op.kind in ("gather", "reduce", "broadcast"):
            issued.append(f"{op} {self.ranks}")
        real(self, op, nbytes)

    with mock.patch.object(Group, "_count", count):
        yield issued


class Twice(nn.Module):
    """Blocks that are used twice in one forward, the second time in reverse, and one that is idle on some ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Idle.block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *reversed(self.blocks)]:
            x = block(x)
        return x


class Nested(nn.Module):
    """Units inside units."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(Idle.block(), nn.Linear(D, D), Idle.block(), nn.Linear(D, D)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Recomputing(nn.Module):
    """The script's own checkpoints, of either kind."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Idle.block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for a, b in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = checkpoint(lambda y, a=a, b=b: b(a(y)), x, use_reentrant=self.reentrant)
        return x


class Reentrant(Recomputing):
    reentrant = True


def make(kind: type[nn.Module]) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    model = kind()
    return model, [m for m in model.modules() if isinstance(m, Idle.block)]


def orders(kind: type[nn.Module], strategy: str, idle: int) -> list[str]:
    """The collectives of three steps; in each, other ranks have an idle layer in unit ``idle``."""
    model, experts = make(kind)
    units: Any = (
        (Idle.block, nn.Sequential) if kind is Nested else (kind.block if hasattr(kind, "block") else Idle.block)
    )
    shardwise.fully_shard(model, strategy=strategy, units=units)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with recorded() as issued:
        for step in range(3):
            if experts:
                experts[idle].idle = (rank() + step) % 2 == 0
            loss = (
                model.loss(rows(step, rank())) if hasattr(model, "loss") else model(rows(step, rank())).square().mean()
            )
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
    assert issued and all(torch.isfinite(torch.tensor(losses)))
    if strategy.startswith("zero3"):  # overlap is kept: reduces are not left to the end of the backward
        backward = [k for k in issued if not k.startswith("broadcast")]
        first = next(k for k, what in enumerate(backward) if what.startswith("reduce"))
        assert any(what.startswith("gather") for what in backward[first:])
    return issued


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "hsdp,shard_size=2"])
@pytest.mark.parametrize("kind", [Idle, Auxiliary, Passing, Twice, Nested, Recomputing, Reentrant])
def test_one_order_on_all_ranks(kind, strategy):
    for idle in (0, 3) if kind is Idle else (1,):
        first, *others = run(4 if "hsdp" in strategy else 2, orders, kind, strategy, idle)

        def plain(issued: list[str]) -> list[str]:
            return [what.split(" (")[0] for what in issued]

        assert all(plain(other) == plain(first) for other in others)
