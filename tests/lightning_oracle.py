"""What the tests of Lightning and Ray train, and the same in plain PyTorch on one process. Knows neither of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models import Block, whole


class Net(nn.Module):
    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 5))
        self.critic = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
        self.heat = nn.Parameter(torch.ones(()))


def make(seed: int | None = 0) -> Net:
    if seed is not None:
        torch.manual_seed(seed)
    return Net()


def data(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(5))
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 1)


def epoch_of(epoch: int, rows: int, *tensors: torch.Tensor, shuffled: bool = True) -> list[tuple[torch.Tensor, ...]]:
    """An epoch's whole batches: a Trainer on several ranks shuffles, as ``DistributedSampler`` does."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(epoch))
    order = order if shuffled else torch.arange(len(order))
    return [tuple(t[at] for t in tensors) for at in order.split(rows)]


def noise(x: torch.Tensor) -> torch.Tensor:
    """Made of a sample, so that it does not depend on which rank has it."""
    return torch.sin(7 * x)


class Scaled(nn.Module):
    """``Lit`` without Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = make(), nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale


def train(
    epochs: int = 2, rows: int = 8, window: int = 1, norm: float | None = None, value: float | None = None,
    dtype: torch.dtype | None = None, shuffled: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """One plain process on whole batches of ``rows``, ``window`` of them to a step. Returns the weights."""
    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for epoch in range(epochs):
        for number, (x, y) in enumerate(epoch_of(epoch, rows, *data(), shuffled=shuffled)):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(x).float(), y)
            (loss / window).backward()
            if (number + 1) % window == 0:
                if norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), norm)
                if value is not None:
                    nn.utils.clip_grad_value_(model.parameters(), value)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return whole(model)


def train_gan(epochs: int = 2, rows: int = 8) -> dict[str, Any]:
    """One plain process; returns the weights under the names that ``LitGAN`` has."""
    torch.manual_seed(0)
    both = GAN()
    own = [*both.generator.parameters(), both.heat]
    for_generator, for_critic = torch.optim.Adam(own, lr=1e-2), torch.optim.Adam(both.critic.parameters(), lr=1e-2)
    for epoch in range(epochs):
        for (real,) in epoch_of(epoch, rows, data()[0]):
            z = noise(real)
            fooled = F.softplus(-both.critic(both.generator(z)) * both.heat).mean()
            for_generator.zero_grad()
            fooled.backward()
            nn.utils.clip_grad_norm_(own, 0.1)
            for_generator.step()
            told = F.softplus(both.critic(both.generator(z).detach())).mean() + F.softplus(-both.critic(real)).mean()
            for_critic.zero_grad()
            told.backward()
            for_critic.step()
    return {name.replace("critic.", "critic.0."): value for name, value in whole(both).items()}
