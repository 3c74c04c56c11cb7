"""Values that come and go: whatever a script keeps, leaves lying about or reads late is there when it is needed.

Each model does something that a user of a sharding library reported. The same model, plain, on one process, is the
oracle: losses and gradients must be its own, under every strategy and whatever else is on.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardwise
from models import rank, world
from ranks import run
from slowly import slow_unless

D = 8


class Base(nn.Module):
    """Four blocks of the class that a case names, and a way to get a loss out of them."""

    block: type[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.blocks = nn.ModuleList(self.block() for _ in range(4))
        self.last = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).square().mean()


class Detached(Base):
    """A weight used detached beside itself."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(D, D) / 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.w[0].detach()) @ self.w + x * self.w.data.mean(0)


class Auxiliary(Base):
    """Each block leaves a loss of its own on the module."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + self.a(x)
            self.aux = self.h(torch.tanh(y)).square().mean()
            return y

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).square().mean() + sum(b.aux for b in self.blocks)


class Fed(Base):
    """Frozen layers whose input comes by an attribute, from a part of the model outside of the block."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.a = nn.Linear(D, D).requires_grad_(False), nn.Parameter(torch.ones(D))
            self.context: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.a + torch.tanh(self.frozen(torch.tanh(self.frozen(self.context))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            block.context = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Kept(Base):
    """The loss comes from what an earlier block keeps, and never passes through what the model returns."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(D))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = x @ self.w
            return x + self.kept * self.w.mean()

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        self(x)
        return self.blocks[1].kept.square().mean() * 1e-3


class Table(Base):
    """A unit that returns a view of its parameter, and one that returns the parameter."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t, self.n = nn.Parameter(torch.randn(16, D)), nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> Any:
            return {"view": self.t[: len(x)], "all": (self.t, None)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            out = block(x)
            x = x + out["view"]
        return self.last(x) + out["all"][0].mean(0)


class Cached(Base):
    """A view of a weight is kept as a plain tensor and used by later blocks, as tables of positions are."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(D, D) / 3)
            self.shared: dict[str, torch.Tensor] = {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if "row" not in self.shared:
                self.shared["row"] = self.w[0].detach()
            return x @ self.w + self.shared["row"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared: dict[str, torch.Tensor] = {}
        for block in self.blocks:
            block.shared = shared
        return super().forward(x)


class Weights(Base):
    """A penalty on weights, inside of gathered() where values are split."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.l(x))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        out = self(x).square().mean()
        if not hasattr(self.first.weight, "_shardwise_unit"):
            return out + 0.1 * sum((p * p).sum() + p.sum() for p in self.parameters())
        with shardwise.gathered(self):
            return out + 0.1 * sum((p * p).sum() + p.sum() for p in self.parameters())


class Idle(Base):
    """One layer of a block is idle now and then, on some ranks only (an expert without tokens)."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.idle = nn.Linear(D, D), nn.Linear(D, D), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(x)
            return x if self.idle else x + self.b(x)


class Frozen(Base):
    """A block is frozen between forward and backward."""

    block = Weights.block

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        for p in self.blocks[2].parameters():
            p.requires_grad_(True)
        out = self(x).square().mean()
        for p in self.blocks[2].parameters():
            p.requires_grad_(False)
        return out


class Recomputed(Auxiliary):
    """Blocks under the script's own checkpoints, with an auxiliary output each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).square().mean()


class Passing(Base):
    """A block that returns its input beside what it computed."""

    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(D, D)

        def forward(self, x: torch.Tensor, before: Any = None) -> Any:
            return x, torch.tanh(self.l(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            same, y = block(x)
            x = same + y
        return self.last(x)


CASES = [Detached, Auxiliary, Fed, Kept, Table, Cached, Weights, Idle, Frozen, Recomputed, Passing]
STRATEGIES = [
    "ddp",
    "zero1",
    "zero2",
    "zero3",
    "hsdp,shard_size=2",
    "zero3,offload_params=nvme",
    "ddp,offload_params=nvme",
]


def rows(index: int, of: int) -> torch.Tensor:
    return torch.randn(3, D, generator=torch.Generator().manual_seed(10 * index + of))


def gradients(case: type[Base], strategy: str, steps: int) -> list[Any]:
    """Per step: losses on every rank's rows and the mean gradients, with a step of SGD in between."""
    torch.manual_seed(0)
    plain = case()
    torch.manual_seed(0)
    model = shardwise.fully_shard(
        case(), strategy=strategy, units=(case.block, nn.Linear) if case is Fed else case.block
    )
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(steps):
        for opt in (ours, theirs):
            opt.zero_grad()
        for of in range(world()):
            for k, block in enumerate(plain.blocks):
                block.idle = case is Idle and k == 3 and (of + index) % 2 == 1
            (plain.loss(rows(index, of)) / world()).backward()
        for k, block in enumerate(model.blocks):
            block.idle = case is Idle and k == 3 and (rank() + index) % 2 == 1
        loss = model.loss(rows(index, rank()))
        assert torch.isfinite(loss)
        loss.backward()
        with shardwise.gathered(model, grads=True):
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                grad = torch.zeros_like(q) if p.grad is None else p.grad
                want = torch.zeros_like(q) if q.grad is None else q.grad
                torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        for opt in (ours, theirs):
            opt.step()
    if strategy.startswith("zero3") and case not in (Cached,):
        del loss
        gc.collect()
        model.eval()
        with torch.no_grad():
            model(rows(0, 0))
        assert shardwise.stats(model).live["gather_buffers"] == 0, "nothing keeps values longer than it is there"
    return []


@pytest.mark.parametrize(
    ("case", "strategy"),
    [  # under zero3, where values go, and under the others in turn
        slow_unless(strategy == "zero3" or (c + s) % 4 == 0, case, strategy)
        for c, case in enumerate(CASES)
        for s, strategy in enumerate(STRATEGIES)
    ],
)
def test_gradients_are_those_of_plain_torch(case, strategy, tmp_path):
    if "nvme" in strategy:
        strategy += f",nvme_path={tmp_path}"
    run(2, gradients, case, strategy, 3)


def test_in_groups_of_ranks():
    for case in (Idle, Auxiliary, Detached):
        run(4, gradients, case, "hsdp,shard_size=2", 2)


def alone(case: type[Base], path: str) -> None:
    gradients(case, f"zero3,offload_params=nvme,nvme_path={path}", 2)


@pytest.mark.parametrize("case", CASES)
def test_on_one_rank(case, tmp_path):
    alone(case, str(tmp_path))


def aliases() -> None:
    """What looks at values past the engine keeps their bytes alive: never a crash, never another tensor's numbers."""
    torch.manual_seed(0)
    model = shardwise.fully_shard(Weights(), strategy="zero3", units=Weights.block)
    x = rows(0, rank())
    with shardwise.gathered(model):
        want = model.blocks[0].l.weight.detach().clone()
        alias, array = model.blocks[0].l.weight.data[1:3], model.blocks[1].l.weight.detach().numpy()
        kept = np.array(array)
    assert torch.equal(alias, want[1:3]) and np.array_equal(array, kept)
    with torch.no_grad():
        model(x)
    assert torch.equal(alias, want[1:3]) and np.array_equal(array, kept)
    before = shardwise.stats(model).live["gather_buffers"]
    assert before > 0  # and it is counted
    del alias, array
    with torch.no_grad():
        model(x)
    assert shardwise.stats(model).live["gather_buffers"] < before


def test_plain_aliases_of_values_that_were_released():
    run(2, aliases)


def stale(strategy: str) -> None:
    """A graph from before a step: plain torch says that its tensors were modified, and so do we."""
    torch.manual_seed(0)
    model = shardwise.fully_shard(Weights(), strategy=strategy, units=Weights.block)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = model.loss(rows(0, rank())), model.loss(rows(1, rank()))
    first.backward()
    opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
    model.loss(rows(2, rank())).backward()  # and it goes on
    opt.step()


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_backward_through_values_of_before_a_step_is_refused(strategy):
    run(2, stale, strategy)


def changed_in_place(strategy: str) -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.l(x).exp()
            z = y * 2
            y.add_(1)  # exp's backward needs it as it was
            return z

    model = shardwise.fully_shard(nn.Sequential(Changes(), Changes()), strategy=strategy, units=Changes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(rows(0, rank())).sum().backward()


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_what_autograd_saved_and_was_changed_is_refused(strategy):
    run(2, changed_in_place, strategy)


class Sub(nn.Parameter):
    """A parameter of a class of its own."""


def subclass(strategy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(D, D) for _ in range(5)))
    model[1].weight = Sub(torch.eye(D))
    x = rows(0, rank())
    shardwise.fully_shard(model, strategy=strategy, units=nn.Linear)
    model(x).square().sum().backward()
    assert isinstance(model[1].weight, Sub)
    if strategy == "zero3":
        with pytest.raises(shardwise.ShardwiseError, match="while its values are released"):
            model[1].weight.sum()
    with shardwise.gathered(model):
        assert type(model[1].weight) is Sub and float(model[1].weight.sum()) == D


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_subclasses_of_parameter(strategy):
    run(2, subclass, strategy)


def caught(strategy: str) -> None:
    """A failure that the script survives leaves no pass behind, in forward and in backward."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.how = nn.Linear(D, D), ""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.how == "forward":
                raise ValueError("in forward")
            y = self.l(x)
            if self.how == "backward":
                y.register_hook(self.boom)
            return y

        def boom(self, grad: torch.Tensor) -> None:
            raise ValueError("in backward")

    torch.manual_seed(0)
    plain = nn.Sequential(*(Fails() for _ in range(4)))
    torch.manual_seed(0)
    model = shardwise.fully_shard(nn.Sequential(*(Fails() for _ in range(4))), strategy=strategy, units=Fails)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for how in ("forward", "backward", "backward"):
        model[1].how = how
        with pytest.raises(ValueError, match=how):
            model(rows(0, rank())).square().mean().backward()
        model[1].how = ""
        if strategy == "zero3" and how == "forward":
            with pytest.raises(shardwise.ShardwiseError, match="while its values are released"):
                model[2].l.weight.sum()
        for opt in opts:
            opt.zero_grad()
        # A backward of another graph right behind the one that failed.
        model(rows(1, rank())).square().mean().backward()
        for of in range(world()):
            (plain(rows(1, of)).square().mean() / world()).backward()
        for opt in opts:
            opt.step()
        state = model.state_dict()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_caught_exception_leaves_no_pass_active(strategy):
    run(2, caught, strategy)
