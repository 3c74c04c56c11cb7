"""Evaluation over several ranks: two kinds of numbers, and the right way for each.

*Values per sample* (predictions, hits): ``gather_for_metrics``. The loader repeats samples to make the ranks' last
batches equal; it leaves these out, so every sample counts once.

*Means per batch* (a loss): the ranks' last batches may hold different numbers of real samples, so a mean of means is
wrong. Sum up values and counts, reduce both, divide.
"""

import argparse

import torch
import torch.nn.functional as F

from shardwise import Accelerator
from shardwise.utils import set_seed
from toy import Classifier, loaders, loss_of


def main(argv: list[str] | None = None) -> tuple[int, float, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(argv)

    accelerator = Accelerator()
    set_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training, held_out = loaders()
    model, optimizer, training, held_out = accelerator.prepare(model, optimizer, training, held_out)
    for _ in range(options.epochs):
        for batch in training:
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    guesses, answers, losses = [], [], []
    with torch.no_grad():
        for points, arm in held_out:
            scores = model(points)
            # Any nest of tensors with a row per sample.
            guess, answer, loss = accelerator.gather_for_metrics(
                (scores.argmax(dim=1), arm, F.cross_entropy(scores, arm, reduction="none"))
            )
            guesses.append(guess)
            answers.append(answer)
            losses.append(loss)
    seen = sum(len(guess) for guess in guesses)
    right = (torch.cat(guesses) == torch.cat(answers)).float().mean().item()
    mean = torch.cat(losses).mean().item()
    accelerator.print(f"{seen} samples, accuracy {right:.3f}, mean loss {mean:.4f}")

    # The same mean without sending a row per sample: this rank's sum and count over a loader that repeats nothing.
    accelerator.even_batches = False
    _, plain = loaders()
    plain = accelerator.prepare(plain)
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    with torch.no_grad(), accelerator.join_uneven_inputs([model]):  # ranks may end at different times
        for points, arm in plain:
            sums[0] += F.cross_entropy(model(points), arm, reduction="sum")
            sums[1] += len(arm)
    total, count = accelerator.reduce(sums).tolist()
    accelerator.print(f"{count:.0f} samples, mean loss {total / count:.4f}")
    return seen, mean, total / count


if __name__ == "__main__":
    main()
