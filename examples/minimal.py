"""The smallest training script. Start it with python, or on several ranks:

shardwise launch --nproc 2 --strategy zero3 examples/minimal.py
"""

import argparse

import torch

from shardwise import Accelerator
from shardwise.utils import set_seed
from toy import Classifier, accuracy, loaders, loss_of


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(argv)

    accelerator = Accelerator()
    set_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training, held_out = loaders()
    model, optimizer, training, held_out = accelerator.prepare(model, optimizer, training, held_out)

    for _ in range(options.epochs):
        for batch in training:
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    right = accuracy(accelerator, model, held_out)
    accelerator.print(f"accuracy {right:.3f} on {accelerator.num_processes} ranks under {accelerator.strategy}")
    return right


if __name__ == "__main__":
    main()
