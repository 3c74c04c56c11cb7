"""Local SGD: the ranks train on their own for N steps, then average their parameters.

One exchange in N steps instead of one per step, for slow networks; see https://arxiv.org/abs/1805.09767.
"""

import argparse

import torch

from shardwise import Accelerator
from shardwise.local_sgd import LocalSGD
from shardwise.utils import set_seed
from toy import Classifier, accuracy, loaders, loss_of


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--local-sgd-steps", type=int, default=8)
    options = parser.parse_args(argv)

    accelerator = Accelerator(strategy="ddp")
    set_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training, held_out = loaders()
    model, optimizer, training, held_out = accelerator.prepare(model, optimizer, training, held_out)

    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=options.local_sgd_steps) as local_sgd:
        for _ in range(options.epochs):
            for batch in training:
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()

    right = accuracy(accelerator, model, held_out)
    accelerator.print(f"accuracy {right:.3f}, parameters averaged every {options.local_sgd_steps} steps")
    return right


if __name__ == "__main__":
    main()
