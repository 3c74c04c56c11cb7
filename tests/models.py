"""Small models and a training loop that the tests share."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardwise

PRESETS = ["ddp", "zero1", "zero2", "zero3"]


class Block(nn.Module):
    def __init__(self, d: int, odd: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, 3 * d)
        self.down = nn.Linear(3 * d, d, bias=False)
        self.gain = nn.Parameter(torch.ones(() if odd else (1,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(F.gelu(self.up(self.norm(x))))


class LM(nn.Module):
    """A byte-level model with odd sizes, a scalar and an empty parameter, and an optionally tied head."""

    def __init__(self, d: int = 13, layers: int = 3, vocab: int = 31, tied: bool = False, odd: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, odd) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        self.nothing = nn.Parameter(torch.empty(0, 4)) if odd else None
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make(seed: int = 0, **kw: Any) -> LM:
    torch.manual_seed(seed)
    return LM(**kw)


def batch(step: int, rank: int, rows: int = 2, length: int = 5, vocab: int = 31) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, vocab, (rows, length + 1), generator=g)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def forget_compiled() -> None:
    """As if this process, in which other tests ran, had compiled nothing."""
    compiler = sys.modules.get("torch._dynamo.utils")
    if compiler is not None:
        compiler.counters.clear()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def train(strategy: Any, steps: int = 4, clip: float | None = 0.5, optimizer: Any = adamw, **kw: Any):
    """Losses, norms and final weights of a sharded run on this rank's own batches."""
    model = make(**kw)
    shardwise.fully_shard(model, strategy=strategy)
    opt = optimizer(model.parameters())
    losses, norms = [], []
    for step in range(steps):
        loss = loss_of(model, batch(step, rank()))
        loss.backward()
        if clip is not None:
            norms.append(shardwise.clip_grad_norm_(model, clip).item())
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, norms, whole(model)


def train_alone(size: int, steps: int = 4, clip: float | None = 0.5, optimizer: Any = adamw, **kw: Any):
    """The oracle: one plain process on the concatenated batch of ``size`` ranks."""
    model = make(**kw)
    opt = optimizer(model.parameters())
    losses, norms = [], []
    for step in range(steps):
        loss = loss_of(model, torch.cat([batch(step, r) for r in range(size)]))
        loss.backward()
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, norms, whole(model)


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=tol, atol=tol, msg=lambda m, k=k: f"{k}: {m}")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), f"{k} differs by {(a[k].double() - b[k].double()).abs().max()}"


def step(model, optimizer, index):
    """One step on this rank's batch; its loss."""
    loss = loss_of(model, batch(index, rank()))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
