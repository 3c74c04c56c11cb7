"""Stop early, on all ranks at once: any rank may raise the flag, and every rank sees it at the same step.

A rank that left the loop by itself would leave the others waiting in their next collective.
"""

import argparse

import torch

from shardwise import Accelerator
from shardwise.utils import set_seed
from toy import Classifier, loaders, loss_of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=float, default=0.35, help="stop when one rank's loss is below")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(argv)

    accelerator = Accelerator()
    set_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training, _ = loaders()
    model, optimizer, training = accelerator.prepare(model, optimizer, training)

    steps = 0
    for _ in range(options.epochs):
        for batch in training:
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if loss.item() < options.target:  # this rank's own loss: the ranks differ
                accelerator.set_trigger()
            if accelerator.check_trigger():
                accelerator.print(f"stopped after {steps} steps")
                return steps
    accelerator.print(f"the target was not met in {steps} steps")
    return steps


if __name__ == "__main__":
    main()
