"""Small models that tell what the engine and Python cost: of many operations in a unit or few, cached or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.plan.simulate import Step
from shardwise.strategy import Strategy

_LENGTH = 16
_SMALL, _LARGE = (160, 2), (352, 4)
"""Width and blocks: units too large to travel together, and all in a cache; or more than a cache holds."""


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 7 * width), nn.Linear(7 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class _Stack(nn.Module):
    def __init__(self, block: Callable[[int], nn.Module], width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(width) for _ in range(layers))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _loss(width: int, rows: int, model: nn.Module) -> Tensor:
    """Of a batch of its own."""
    x = torch.ones(rows * _LENGTH, width).view(rows, _LENGTH, width)
    return F.cross_entropy(model(x).flatten(0, 1), torch.zeros(rows * _LENGTH, dtype=torch.long))


def _optimizers(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(params)]


def steps(ranks: int) -> list[Step]:
    """Steps that differ in what the engine has to do, on so many ranks of a CPU."""
    whole, split = Strategy.parse("ddp"), Strategy.parse("zero3")
    again = split.replace(activation_checkpointing=True)
    strategies = (whole, split, again) if ranks > 1 else (whole, again)
    small = [(block, _SMALL, 1, strategy) for block in (_Attention, _Plain) for strategy in strategies]
    large = [(_Attention, _SMALL, 16, whole), (_Plain, _SMALL, 64, whole), (_Attention, _LARGE, 8, split),
             (_Attention, _LARGE, 2, whole), (_Plain, _LARGE, 8, whole)]  # fmt: skip
    return [
        Step(partial(_Stack, block, *size), partial(_loss, size[0], rows), _optimizers, strategy, torch.device("cpu"),
             ranks, ranks, 1, 1.0)
        for block, size, rows, strategy in small + large
    ]  # fmt: skip
