"""Models that the planner is measured with: functions of rows that return ``(model, inputs, loss)``.

Small enough to run for real on a CPU, and of the kinds that people train. ``shardwise plan`` takes them as they are:
``shardwise plan planner_models:llama --devices 2xcpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Made = tuple[nn.Module, Any, Callable[[nn.Module, Any], torch.Tensor]]
SEQ = 64


def _of_output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).loss


def _text(rows: int, vocab: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocab, (rows, SEQ))
    return {"input_ids": ids, "labels": ids}


def gpt(batch: int = 2) -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2048, n_embd=192, n_layer=8, n_head=4, n_positions=SEQ, use_cache=False,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False)  # fmt: skip
    return GPT2LMHeadModel(config), _text(batch, 2048), _of_output


def tied(batch: int = 2) -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2048, n_embd=192, n_layer=8, n_head=4, n_positions=SEQ, use_cache=False,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(config), _text(batch, 2048), _of_output


def llama(batch: int = 2) -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=8,
                         num_attention_heads=4, num_key_value_heads=2, use_cache=False)  # fmt: skip
    return LlamaForCausalLM(config), _text(batch, 2048), _of_output


def vit(batch: int = 2) -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=192, num_hidden_layers=8, num_attention_heads=4, intermediate_size=768,
                       image_size=96, patch_size=16, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0, num_labels=100)  # fmt: skip
    inputs = {"pixel_values": torch.randn(batch, 3, 96, 96), "labels": torch.zeros(batch, dtype=torch.long)}
    return ViTForImageClassification(config), inputs, _of_output


def t5(batch: int = 2) -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=2048, d_model=192, d_kv=48, d_ff=512, num_layers=7, num_decoder_layers=7, num_heads=4,
                      dropout_rate=0.0, use_cache=False, decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config), _text(batch, 2048), _of_output


class Experts(nn.Module):
    """Every expert sees every token, weighted: routing with shapes that do not depend on values."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)  # (rows, tokens, experts)
        return sum(weights[..., k : k + 1] * expert(x) for k, expert in enumerate(self.experts))


class MoEBlock(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.moe_norm, self.moe = nn.LayerNorm(width), Experts(width, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.moe(self.moe_norm(x))


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1024, 128)
        self.blocks = nn.ModuleList(MoEBlock(128, 4) for _ in range(7))
        self.head = nn.Linear(128, 1024, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def moe(batch: int = 2) -> Made:
    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    return MoE(), torch.randint(0, 1024, (batch, SEQ)), loss


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(y)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        self.first = nn.Sequential(*(Residual(64) for _ in range(6)))
        self.down = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.second = nn.Sequential(*(Residual(128) for _ in range(6)))
        self.head = nn.Linear(128, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.down(self.first(self.stem(x))))
        return self.head(x.mean((2, 3)))


def resnet(batch: int = 2) -> Made:
    def loss(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(images), torch.zeros(images.shape[0], dtype=torch.long, device=images.device))

    return ResNet(), torch.randn(batch, 3, 64, 64), loss


MODELS: dict[str, Callable[[int], Made]] = {f.__name__: f for f in (gpt, tied, llama, vit, t5, moe, resnet)}
