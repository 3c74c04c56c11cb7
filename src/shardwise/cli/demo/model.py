"""A small GPT over bytes, written to be read.

The vocabulary is the 256 byte values, so there is no tokenizer, and the loss in bits *is* bits per byte.
Shapes in comments: B rows, T positions, D width, H heads, K = D/H width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

VOCAB = 256
SEEN = 4  # bytes that a position's embedding sees: its own and the three before it


@dataclass(frozen=True)
class Shape:
    """The size of a model, and how much text one rank reads per step."""

    width: int
    layers: int
    heads: int
    context: int = 128
    rows: int = 2

    @property
    def parameters(self) -> int:
        """Each layer has 4 D² for attention and 8 D² for the MLP; each embedding table and the head have 256 D."""
        return 12 * self.layers * self.width**2 + (SEEN + 1) * VOCAB * self.width


SIZES = {
    "tiny": Shape(64, 2, 2, context=64),
    "small": Shape(192, 4, 4),
    "10m": Shape(384, 6, 6),
    "25m": Shape(512, 8, 8),
    "100m": Shape(1024, 8, 16, context=256),
    "300m": Shape(1280, 15, 20, context=512),
    "1b": Shape(2048, 20, 16, context=1024),
}


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without learned gains: the next matrix can learn them."""
    return F.rms_norm(x, (x.size(-1),))


def angles(positions: int, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of what :func:`rotate` turns by: (T, K/2) each. Fast for the first pairs, slow for the last."""
    half = width // 2
    frequency = 1000.0 ** -(torch.arange(half, device=like.device) / half)
    angle = torch.outer(torch.arange(positions, device=like.device), frequency)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: turn each pair of channels by an angle that grows with the position.

    The product of a query and a key then depends on how far apart they are, not on where.
    """
    a, b = x.chunk(2, dim=-1)  # (B, H, T, K/2) each
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention: each position mixes in what earlier ones offer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, T, K) each
        # Normalised queries and keys bound the attention scores, which allows a high learning rate.
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, K)
        return self.out(y.transpose(1, 2).reshape(b, t, d))  # (B, T, D)


class MLP(nn.Module):
    """Four times wider inside, with a squared ReLU between."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """One layer. Under ZeRO-3 this is the unit whose parameters are gathered and freed together."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.mlp = MLP(shape)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(norm(x), cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Bytes in, logits over the next byte out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        # One table for each of the last bytes, in one matrix. Knowing its neighbours from the start, a position
        # need not find them by attention first, which a run of two minutes has no time to learn.
        self.embed = nn.Embedding(SEEN * VOCAB, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, VOCAB, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.normal_(self.embed.weight)
        for k, table in enumerate(self.embed.weight.split(VOCAB)):
            table.mul_(0.7 ** (SEEN - 1 - k))  # the nearer the byte, the larger its part
        nn.init.zeros_(self.head.weight)  # begins with uniform predictions: 8 bits per byte
        bound = (3 / self.shape.width) ** 0.5  # keeps the variance of what passes through
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.uniform_(block.attention.qkv.weight, -bound, bound)
            nn.init.uniform_(block.mlp.up.weight, -bound, bound)
            # Layers begin by adding nothing, so that the signal passes however deep the model is.
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids`` (B, T) to logits (B, T, 256)."""
        last = F.pad(ids, (SEEN - 1, 0)).unfold(1, SEEN, 1)  # (B, T, SEEN), a position's own byte last
        rows = last + VOCAB * torch.arange(SEEN, device=ids.device)
        x = norm(self.embed(rows).sum(2))  # (B, T, D)
        cos, sin = angles(ids.size(1), self.shape.width // self.shape.heads, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(norm(x)).float()
