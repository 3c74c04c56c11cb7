"""What the examples train: a small classifier that tells the arms of a spiral apart, on data made on the spot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def spirals(samples: int, arms: int = 3, seed: int = 0) -> TensorDataset:
    """Points of a spiral with ``arms`` arms, and which arm each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(arms, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator)
    angle = 4 * radius + arm * 2 * torch.pi / arms + 0.1 * torch.randn(samples, generator=generator)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)  # (samples, 2)
    return TensorDataset(points, arm)


class Classifier(nn.Module):
    """Scores for each arm, from (batch, 2) points to (batch, arms)."""

    def __init__(self, width: int = 32, arms: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, arms)
        )

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.layers(points)


def loaders(batch_size: int = 32, training: int = 480, held_out: int = 101) -> tuple[DataLoader, DataLoader]:
    """Shuffled training batches, and held-out ones whose number no number of ranks divides."""
    return (
        DataLoader(spirals(training), batch_size=batch_size, shuffle=True),
        DataLoader(spirals(held_out, seed=1), batch_size=batch_size),
    )


def loss_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    points, arm = batch
    return F.cross_entropy(model(points), arm)


def accuracy(accelerator, model: nn.Module, loader: DataLoader) -> float:
    """The share of held-out points that are told right: each counted once, however many ranks there are."""
    model.eval()
    right = []
    for points, arm in loader:
        with torch.no_grad():
            guess = model(points).argmax(dim=1)
        right.append(accelerator.gather_for_metrics(guess == arm))
    model.train()
    return torch.cat(right).float().mean().item()
