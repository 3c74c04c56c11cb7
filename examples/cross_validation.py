"""Cross-validation: K models on K splits, one after the other in the same processes, and their votes together."""

import argparse

import torch
from torch.utils.data import DataLoader, Subset

from shardwise import Accelerator
from shardwise.utils import set_seed
from toy import Classifier, loaders, loss_of, spirals


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=16)
    options = parser.parse_args(argv)

    accelerator = Accelerator()
    data = spirals(240)
    _, held_out = loaders()
    held_out = accelerator.prepare(held_out)
    fold_of = torch.arange(len(data)) % options.folds
    votes = []
    for fold in range(options.folds):
        set_seed(fold)
        model = Classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        training = DataLoader(Subset(data, (fold_of != fold).nonzero().flatten().tolist()), 16, shuffle=True)
        validation = DataLoader(Subset(data, (fold_of == fold).nonzero().flatten().tolist()), 16)
        model, optimizer, training, validation = accelerator.prepare(model, optimizer, training, validation)
        for _ in range(options.epochs):
            for batch in training:
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()

        model.eval()
        with torch.no_grad():
            right = torch.cat([accelerator.gather_for_metrics(model(x).argmax(1) == y) for x, y in validation])
            accelerator.print(f"fold {fold}: accuracy {right.float().mean():.3f} on {len(right)} samples")
            votes.append(torch.cat([accelerator.gather_for_metrics(model(x).softmax(1)) for x, _ in held_out]))
        model, optimizer = accelerator.free_memory(model, optimizer)

    with torch.no_grad():
        answers = torch.cat([accelerator.gather_for_metrics(y) for _, y in held_out])
    accuracy = (torch.stack(votes).mean(dim=0).argmax(dim=1) == answers).float().mean().item()
    accelerator.print(f"all {options.folds} together: accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
