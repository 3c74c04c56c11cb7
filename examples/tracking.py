"""Log a run: to a JSON-lines file, which needs nothing, and to any tracker that is installed.

python examples/tracking.py --with jsonl tensorboard
"""

import argparse

import torch

from shardwise import Accelerator
from shardwise.logging import get_logger
from shardwise.utils import set_seed
from toy import Classifier, accuracy, loaders, loss_of

logger = get_logger(__name__)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs")
    parser.add_argument("--with", dest="trackers", nargs="+", default=["jsonl"])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(argv)

    accelerator = Accelerator(log_with=options.trackers, project_dir=options.folder)
    set_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training, held_out = loaders()
    model, optimizer, training, held_out = accelerator.prepare(model, optimizer, training, held_out)

    accelerator.init_trackers("spirals", config={"epochs": options.epochs, "lr": 1e-2})
    step = 0
    for epoch in range(options.epochs):
        for batch in training:
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.log({"train/loss": loss.item()}, step=step)  # rank 0's
            step += 1
        right = accuracy(accelerator, model, held_out)
        accelerator.log({"eval/accuracy": right, "epoch": epoch}, step=step)
        logger.info("epoch %d: accuracy %.3f", epoch, right)  # once, whatever the number of ranks
    accelerator.end_training()
    return right


if __name__ == "__main__":
    main()
