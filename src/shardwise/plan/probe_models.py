"""Two small models that tell what the engine and Python cost: one with many operations in a unit, one with few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.plan.simulate import Step
from shardwise.strategy import Strategy

_WIDTH, _ROWS, _LENGTH, _LAYERS = 192, 1, 16, 4


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
        self.up, self.down = nn.Linear(_WIDTH, 5 * _WIDTH), nn.Linear(5 * _WIDTH, _WIDTH)

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


def loss(model: nn.Module) -> Tensor:
    """Of a batch of its own."""
    return F.mse_loss(model(torch.ones(_ROWS, _LENGTH, _WIDTH)), torch.zeros(_ROWS, _LENGTH, _WIDTH))


def optimizers(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(params)]


def both(ranks: int) -> list[Step]:
    """A step of each, on so many ranks of a CPU."""
    cpu = torch.device("cpu")
    return [
        Step(build, loss, optimizers, Strategy.parse("zero3"), cpu, ranks, ranks, 1, 1.0)
        for build in (attention, plain)
    ]
