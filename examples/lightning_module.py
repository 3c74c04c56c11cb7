"""A LightningModule under Lightning's Trainer, sharded. Lightning starts the ranks itself, or a launcher does:

python examples/lightning_module.py --devices 2 --strategy zero3
shardwise launch --nproc 2 --strategy zero2 examples/lightning_module.py
python examples/lightning_module.py --devices 2 --resume last      # goes on from the newest checkpoint, if there is one

The Trainer's loops, callbacks and plugins are as they are. A checkpoint is a folder that any strategy and any number
of ranks goes on from; ``export_checkpoint`` makes the file that ``load_from_checkpoint`` reads.
"""

import argparse
import os
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from shardwise.lightning import ShardwiseStrategy, export_checkpoint
from toy import Classifier, loaders


class Spirals(lightning.LightningModule):
    def __init__(self, width: int = 32, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.classifier = Classifier(width)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        points, arm = batch
        return F.cross_entropy(self.classifier(points), arm)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        points, arm = batch
        right = (self.classifier(points).argmax(dim=1) == arm).float().mean()
        self.log("accuracy", right, sync_dist=True, batch_size=len(arm))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1, help="ranks, where no launcher says so")
    parser.add_argument("--strategy", default="zero3")
    parser.add_argument("--start-method", default="popen", help="how the Trainer starts them: popen, spawn, fork")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", default="runs/lightning")
    parser.add_argument("--resume", help="a checkpoint, or last")
    options = parser.parse_args(argv)

    lightning.seed_everything(0, verbose=False)
    strategy = ShardwiseStrategy(options.strategy, start_method=options.start_method)
    saving = ModelCheckpoint(dirpath=options.folder, monitor="accuracy", mode="max", save_last=True)
    trainer = lightning.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", options.devices)),
        max_epochs=options.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    training, held_out = loaders(batch_size=16)
    trainer.fit(Spirals(), training, held_out, ckpt_path=options.resume)

    accuracy = trainer.callback_metrics["accuracy"].item()
    if trainer.is_global_zero:
        file = export_checkpoint(saving.best_model_path, Path(options.folder) / "best.pt")
        again = Spirals.load_from_checkpoint(file)
        size = sum(p.numel() for p in again.parameters())
        print(f"accuracy {accuracy:.3f} on {trainer.world_size} ranks; {size} weights in {file}")
    return accuracy


if __name__ == "__main__":
    main()
