"""Accumulation over sequences of different lengths: every *token* counts the same, wherever it is.

The mean of each micro-batch's mean would count tokens of short sequences more. ``backward(loss, weight=tokens)``
gives the gradient of the mean over all tokens of the step, of all ranks and micro-batches.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from shardwise import Accelerator
from shardwise.utils import set_seed


class NextByte(nn.Module):
    """Scores for the next byte, (batch, length) to (batch, length, 16)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(ids))[0])


def sequences(number: int) -> list[torch.Tensor]:
    """Counting modulo 16, from anywhere, for 4 to 20 bytes."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(16, (number,), generator=generator)
    lengths = torch.randint(4, 21, (number,), generator=generator)
    return [(start + torch.arange(length)) % 16 for start, length in zip(starts, lengths, strict=True)]


def padded(batch: list[torch.Tensor]) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args(argv)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    model = NextByte()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    loader = DataLoader(sequences(96), batch_size=4, shuffle=True, collate_fn=padded)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for epoch in range(options.epochs):
        sums.zero_()
        for ids in loader:
            inputs, targets = ids[:, :-1].clamp_min(0), ids[:, 1:]
            tokens = (targets != -100).sum()
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
                accelerator.backward(loss, weight=tokens)
                optimizer.step()
                optimizer.zero_grad()
            sums += torch.stack([loss.detach() * tokens, tokens]).double()
        total, count = accelerator.reduce(sums).tolist()
        accelerator.print(f"epoch {epoch}: {total / count:.3f} nats per token over {count:.0f} tokens")
    return total / count


if __name__ == "__main__":
    main()
