"""Two small models that tell what the engine and Python cost: one with many operations in a unit, one with few."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.plan.simulate import Step
from shardwise.strategy import Strategy

_WIDTH, _LENGTH, _LAYERS = 160, 16, 2  # units too large to travel together, and all in a cache
_ROWS = 16  # of the step that makes much new memory


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(_WIDTH, 7 * _WIDTH), nn.Linear(7 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class _Stack(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(_LAYERS))
        self.head = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def attention() -> nn.Module:
    """Blocks of a transformer."""
    return _Stack(_Attention)


def plain() -> nn.Module:
    """Blocks of two layers."""
    return _Stack(_Plain)


def loss(rows: int, model: nn.Module) -> Tensor:
    """Of a batch of its own."""
    return F.cross_entropy(model(torch.ones(rows * _LENGTH, _WIDTH).view(rows, _LENGTH, -1)).flatten(0, 1),
                           torch.zeros(rows * _LENGTH, dtype=torch.long))  # fmt: skip


def optimizers(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(params)]


def steps(ranks: int) -> list[Step]:
    """A step of each under strategies that differ in what the engine has to do, on so many ranks of a CPU."""
    cpu, whole, split = torch.device("cpu"), Strategy.parse("ddp"), Strategy.parse("zero3")
    again = split.replace(activation_checkpointing=True)
    strategies = (whole, split, again) if ranks > 1 else (whole, again)
    how = [(build, 1, strategy) for build in (attention, plain) for strategy in strategies]
    how += [(attention, _ROWS, whole), (plain, 4 * _ROWS, whole)]
    return [
        Step(build, partial(loss, rows), optimizers, strategy, cpu, ranks, ranks, 1, 1.0)
        for build, rows, strategy in how
    ]
