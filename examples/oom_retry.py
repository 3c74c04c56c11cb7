"""Find the batch size that fits: run out of memory, halve it, try again, on all ranks together.

A contrastive loss compares every sample of a batch with every other one, so its memory grows with the square of the
batch size. The memory is really used up here: ``--limit-mib`` limits what a process may allocate beyond what it has.
"""

import argparse
import resource

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from shardwise import Accelerator
from shardwise.utils import find_executable_batch_size, set_seed
from toy import Classifier, spirals


def limit_memory(mib: int) -> None:
    """Let allocations fail that take this process ``mib`` MiB beyond what it has now (Linux)."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + mib * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1])
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starting-batch-size", type=int, default=2**16)
    parser.add_argument("--limit-mib", type=int, default=1536)
    options = parser.parse_args(argv)
    accelerator = Accelerator()
    data = spirals(2 * options.starting_batch_size)

    halves = (options.starting_batch_size >> n for n in range(1, 64))

    # Without reduce_batch_size_fn a tenth is taken off each time.
    @find_executable_batch_size(
        starting_batch_size=options.starting_batch_size, reduce_batch_size_fn=lambda: next(halves)
    )
    def train(batch_size: int) -> int:
        accelerator.print(f"trying a batch size of {batch_size}")
        accelerator.free_memory()  # what the last attempt left
        set_seed(0)
        model = Classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = DataLoader(data, batch_size, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        points, _ = next(iter(loader))
        one, other = (F.normalize(model(points + 0.01 * torch.randn_like(points)), dim=1) for _ in range(2))
        loss = F.cross_entropy(one @ other.T / 0.1, torch.arange(len(points), device=points.device))  # (batch, batch)
        accelerator.backward(loss)
        optimizer.step()
        return batch_size

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory(options.limit_mib)
    try:
        fits = train()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    accelerator.print(f"a batch size of {fits} fits")
    return fits


if __name__ == "__main__":
    main()
