"""The models that the benchmarks on a CPU train, their data, and the settings of the peer comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a :class:`GPT`."""

    layers: int = 6
    width: int = 512
    heads: int = 8
    vocab: int = 6144
    context: int = 128

    @property
    def parameters(self) -> int:
        """How many elements; norms and biases included."""
        block = 12 * self.width**2 + 13 * self.width
        return self.layers * block + (2 * self.vocab + self.context + 2) * self.width

    def build(self) -> nn.Module:
        return GPT(self)


@dataclass(frozen=True)
class SmallShape(Shape):
    """The sizes of a :class:`Small`: hardly anything to compute, so that what is left is what a library does."""

    layers: int = 64
    width: int = 32
    vocab: int = 64

    @property
    def parameters(self) -> int:
        return self.layers * 2 * (self.width + 1) * self.width

    def build(self) -> nn.Module:
        return Small(self)


@dataclass(frozen=True)
class Setting:
    """The model, and how much each rank computes per step; the bytes on the wire do not depend on ``rows`` and
    ``length``."""

    name: str
    rows: int
    length: int
    about: str
    shape: Shape = Shape()


SETTINGS = {
    s.name: s
    for s in (
        Setting("comm", 1, 64, "bound by communication: micro-batch 1 x 64 tokens"),
        Setting("compute", 4, 128, "bound by computation: micro-batch 4 x 128 tokens"),
        Setting("deep", 4, 128, "38 M in 12 blocks: micro-batch 4 x 128 tokens", Shape(layers=12, vocab=256)),
        Setting("small", 1, 8, "many small units: 64 blocks of two 32 x 32 layers, 8 rows", SmallShape()),
    )
}


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Blocks between an embedding and an untied head; 25 M parameters in the default shape."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.place = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class SmallBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Small(nn.Module):
    """Blocks between a table and its transpose, which are fixed."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(shape.vocab, shape.width), persistent=False)
        self.blocks = nn.ModuleList(SmallBlock(shape.width) for _ in range(shape.layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table[ids]
        for block in self.blocks:
            x = block(x)
        return x @ self.table.T * 0.05


BLOCKS = {Block, SmallBlock}


def make_model(shape: Shape) -> Any:
    """The same initial values on every rank and for every contender."""
    torch.manual_seed(0)
    return shape.build()


def batch(setting: Setting, step: int, rank: int) -> torch.Tensor:
    """Token ids of one micro-batch, the same for every contender."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, setting.shape.vocab, (setting.rows, setting.length + 1), generator=generator)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
