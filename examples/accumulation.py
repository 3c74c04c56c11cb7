"""Gradient accumulation: an optimizer step every N micro-batches, and at the end of the data.

Inside ``accumulate`` the loop is written as if there were none: steps act at the window's last micro-batch only.
A short last window is divided by the micro-batches that it has.
"""

import argparse

import torch

from shardwise import Accelerator
from shardwise.utils import set_seed
from toy import Classifier, accuracy, loaders, loss_of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="micro-batches per optimizer step")
    options = parser.parse_args(argv)

    accelerator = Accelerator(gradient_accumulation_steps=options.steps)
    set_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training, held_out = loaders(batch_size=16)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.99)
    model, optimizer, training, held_out, scheduler = accelerator.prepare(
        model, optimizer, training, held_out, scheduler
    )

    updates = 0
    for _ in range(options.epochs):
        for batch in training:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()  # once per optimizer step, on any number of ranks
                optimizer.zero_grad()
            updates += accelerator.sync_gradients

    right = accuracy(accelerator, model, held_out)
    accelerator.print(f"{updates} updates from {options.epochs * len(training)} micro-batches, accuracy {right:.3f}")
    return updates


if __name__ == "__main__":
    main()
