"""Models for questions to the planner: what a user's file would hold. Not one of them has values."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, VOCABULARY, BLOCKS, MANY = 256, 1000, 2, 7


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Small(nn.Module):
    """A language model of 2.1 million parameters, unless it is deeper."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def small(batch: int = 2, seq: int = 128):
    print("a model's own words")
    return Small(), torch.zeros(batch, seq, dtype=torch.long)


def deep(batch: int = 2, seq: int = 128):
    return Small(MANY), torch.zeros(batch, seq, dtype=torch.long)


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError("this model cannot go back")


class OneWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Fails.apply(self.line(x))


def one_way():
    return OneWay(), torch.zeros(2, 8)


def hooked():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def refuse(module, inputs, output):
        raise KeyError("no gradients here")

    model[0].register_full_backward_hook(refuse)
    return model, torch.zeros(2, 8)


class Ahead(nn.Module):
    def __init__(self, values: bool) -> None:
        super().__init__()
        self.line, self.values = nn.Linear(8, 8), values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.values and self.line(x).nonzero().shape[0] > 3:
            return self.line(x)
        raise RuntimeError("cannot go\nahead")


def needs_values():
    return Ahead(True), torch.zeros(2, 8)


def cannot_run():
    return Ahead(False), torch.zeros(2, 8)


def cannot_be_built():
    raise ValueError("no such thing")


def builds_nothing():
    return 3


def without_rows():
    return nn.Linear(8, 8), {"x": 3}


def frozen():
    return nn.Linear(8, 8).requires_grad_(False), torch.zeros(2, 8)
