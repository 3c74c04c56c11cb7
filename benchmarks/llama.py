"""A Llama-shaped model of plain torch modules: RMSNorm, rotary positions, grouped attention, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LlamaShape:
    """Sizes; ``inner`` is the width between the gate and the last projection of a block."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int

    @property
    def parameters(self) -> int:
        kv = self.width * self.kv_heads // self.heads
        block = 2 * self.width**2 + 2 * self.width * kv + 3 * self.width * self.inner + 2 * self.width
        return self.layers * block + 2 * self.vocab * self.width + self.width

    def flops_per_token(self, length: int) -> float:
        """Forward and backward of one token in sequences of ``length``: what the model needs, without recomputing.

        Six per parameter but the embedding's, and causal attention (PaLM, appendix B, which counts twice this much of
        attention because it counts what the mask leaves out).
        """
        return 6 * (self.parameters - self.vocab * self.width) + 6 * self.layers * self.width * length


SHAPES = {
    "tiny": LlamaShape(2, 64, 4, 2, 160, 256),
    "1b": LlamaShape(22, 2048, 32, 4, 5632, 32000),
    "3b": LlamaShape(26, 3200, 32, 32, 8640, 32000),
    "8b": LlamaShape(32, 4096, 32, 8, 14336, 128256),
}


STD = 0.02


class Linear(nn.Linear):
    """Begins small, so that a deep model's loss begins near ``log(vocab)``; also where it was made on ``meta``."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=STD)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=STD)


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim = shape.width // shape.heads
        kv = self.head_dim * shape.kv_heads
        self.q, self.o = (Linear(shape.width, shape.width) for _ in range(2))
        self.k, self.v = (Linear(shape.width, kv) for _ in range(2))

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = (p(x).view(rows, length, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotate(q, *turn), rotate(k, *turn)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:  # not enable_gqa: some kernels fall back to a slow one under it
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(rows, length, width))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on (rows, heads, length, head_dim)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class LlamaBlock(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.gate, self.up = (Linear(shape.width, shape.inner) for _ in range(2))
        self.down = Linear(shape.inner, shape.width)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), turn)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Ids (rows, length) to logits (rows, length, vocab).

    Args:
        checkpointing: keep only the blocks' inputs for backward.
    """

    def __init__(self, shape: LlamaShape, checkpointing: bool = True) -> None:
        super().__init__()
        self.half, self.checkpointing = shape.width // shape.heads // 2, checkpointing
        self.embed = Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = Linear(shape.width, shape.vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        angle = torch.arange(ids.shape[1], device=ids.device)[:, None] * self._frequencies(ids.device)
        turn = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, turn, use_reentrant=False) if self.checkpointing else block(x, turn)
        return self.head(self.norm(x))

    def _frequencies(self, device: torch.device) -> torch.Tensor:
        return 10000.0 ** (-torch.arange(self.half, device=device, dtype=torch.float32) / self.half)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
